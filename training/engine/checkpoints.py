# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment, and the published model.

    output_dir/
        config.json, model.safetensors, ...  the best model so far, complete: what from_pretrained loads
        checkpoints/step_00000100/           what a resume needs: model, optimiser, schedule, random state
        training_log.jsonl                   truncated to the checkpoint's step on resume, like bad_videos.jsonl

A checkpoint is written under a temporary name and renamed when it is complete.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from data.errors import UserError

from .lora import has_adapter, merge_lora


# How Python, torch and safetensors report a full disk.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
STEP_FOLDER = re.compile(r"step_(\d+)$")


@dataclass
class Progress:
    """The position of a run: `batch` steps of `epoch` are done; `best` are the best validation metrics so far.

    `order` holds what determines the order of the pairs, in another order the position would mean nothing; and the
    options that a resumed run must share.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds of these spent waiting for data
    num_skipped: int = 0  # steps skipped because the gradient was not finite
    same_captions: int = 0  # pairs of different videos with the same caption that were masked
    best: dict | None = None
    order: dict | None = None

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        """Raises UserError if the checkpoint's run had other pairs or another order."""
        saved, here = state["order"] or {}, self.order or {}
        for name in saved.keys() & here.keys():
            if saved[name] != here[name]:
                raise UserError(
                    f"the checkpoint was written with {name} {saved[name]}, now it is {here[name]}: go on with the "
                    "same data, batch and schedule, or start again from the published model with --model_name_or_path"
                )
        for name, value in state.items():
            setattr(self, name, value)


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        output_dir: of the run. limit: number to keep, None for all.
    """

    def __init__(self, output_dir: Path, limit: int | None):
        self.folder = output_dir / "checkpoints"
        self.limit = limit

    def finished(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(STEP_FOLDER.fullmatch(path.name)[1]))

    def save(self, accelerator, step: int):
        """Write the state of everything that `accelerator` prepared or registered. All processes must call this.

        Raises:
            UserError: the disk is full or read-only; the previous checkpoints are untouched.
        """
        target = self.folder / f"step_{step:08d}"
        if target.exists():
            return
        partial = self.folder / f".{target.name}.partial"
        try:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.replace(partial, target)
                self._prune()
        except WRITE_ERRORS as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = self.finished()
            kept = f"the last complete one is {last[-1]}" if last else "there is none yet"
            raise UserError(
                f"cannot write the checkpoint of step {step}: {error}; {kept}; free some space and resume with "
                "--resume_from_checkpoint latest"
            ) from error

    def _prune(self):
        finished = self.finished()
        for path in finished[: len(finished) - self.limit] if self.limit else []:
            # Renamed first: a kill in the middle must not leave half a checkpoint that a resume would find.
            partial = path.with_name(f".{path.name}.partial")
            os.replace(path, partial)
            shutil.rmtree(partial, ignore_errors=True)

    def load(self, accelerator, which: str) -> str | None:
        """Restore a checkpoint: `which` is "latest" (None if there is none yet) or a folder. Returns its name.

        Raises:
            UserError: no such folder, a damaged checkpoint, or one of another model or other data.
        """
        if which == "latest":
            finished = self.finished()
            if not finished:
                return None
            path = finished[-1]
        else:
            path = Path(which)
            if not (path / "model.safetensors").is_file() and not any(path.glob("*model*")):
                raise UserError(f"{path} is not a training checkpoint; give 'latest' or a folder in {self.folder}")
        try:
            accelerator.load_state(str(path))
        except UserError:
            raise
        except Exception as error:  # safetensors, pickle, zip and torch each raise their own types
            cause = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"cannot load the checkpoint {path}: {cause[0]} (a damaged checkpoint may be deleted: `latest` is "
                "then the one before; one of another model does not fit)"
            ) from error
        return path.name


class StepLog:
    """A JSON lines file whose lines have a `step`; lines after the step at which a run resumes are removed.

    Args:
        path: of the file. step: where the run resumes, 0 for a new run. main: whether this process rewrites the file.
    """

    def __init__(self, path: Path, step: int, main: bool):
        self.path = path
        if main:
            kept = [line for line in self.lines() if line["step"] <= step] if step else []
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, path)
            if not kept:
                path.unlink()  # a run without bad videos has no such file

    def lines(self) -> list[dict]:
        """The lines of the file, without an incomplete last line that a kill left."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write(self, **values):
        with self.path.open("a", encoding="utf-8") as file:  # one write per line: processes may share the file
            file.write(json.dumps(values) + "\n")


def save_model(model, processor, output_dir: Path, extra: dict[str, str]):
    """Publish a model: write all of it to a temporary folder first, then move each file into place.

    Args:
        model: a peft model is published merged, with its adapter in `adapter/`.
        extra: file name -> text, saved with it.

    Raises:
        UserError: the disk is full; the previously published model is untouched.
    """
    saving = output_dir / ".saving"
    try:
        shutil.rmtree(saving, ignore_errors=True)
        if has_adapter(model):
            model.save_pretrained(saving / "adapter")
            model = merge_lora(model)
        processor.save_pretrained(saving)  # first: a model that is saved looks for it
        model.save_pretrained(saving)
        for name, text in extra.items():
            (saving / name).write_text(text, encoding="utf-8")
    except WRITE_ERRORS as error:
        shutil.rmtree(saving, ignore_errors=True)
        raise UserError(f"cannot write the model to {output_dir}: {error}; the previous one is untouched") from error
    for file in sorted(path for path in saving.rglob("*") if path.is_file()):
        target = output_dir / file.relative_to(saving)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(saving)
