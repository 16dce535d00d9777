# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Checkpoints that a kill at any moment leaves whole, and the published model beside them.

    output_dir/
        config.json, model.safetensors, ...     the best model so far, complete: what from_pretrained loads
        checkpoints/step_000100/                everything needed to go on: model, optimiser, schedule, random state,
        position training_log.jsonl                      cut back to the checkpoint's step on resume

A checkpoint is written under a temporary name and renamed when it is complete.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from recipe import UserError


STEP_FOLDER = re.compile(r"step_(\d+)$")


@dataclass
class Progress:
    """Where a run is. `batch` batches of `epoch` are done; `best` are the best validation metrics so far."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds of them spent waiting for data
    num_bad: int = 0  # clips that could not be decoded
    num_skipped: int = 0  # steps skipped because the gradient was not finite
    best: dict | None = None

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        for name, value in state.items():
            setattr(self, name, value)


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        output_dir: of the run. limit: how many to keep, None for all.
    """

    def __init__(self, output_dir: Path, limit: int | None):
        self.folder = output_dir / "checkpoints"
        self.limit = limit

    def finished(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(STEP_FOLDER.fullmatch(path.name)[1]))

    def save(self, accelerator, step: int):
        """Write the state of everything that `accelerator` has prepared or registered. All processes call this.

        Raises:
            UserError: the disk is full or read-only; the previous checkpoints are untouched.
        """
        place = self.folder / f"step_{step:08d}"
        if place.exists():
            return
        partial = self.folder / f".{place.name}.partial"
        try:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.replace(partial, place)
                self._prune()
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            last = self.finished()
            kept = f"the last whole one is {last[-1]}" if last else "there is none yet"
            raise UserError(
                f"cannot write the checkpoint of step {step}: {error}; {kept}; free some space and resume with "
                "--resume_from_checkpoint latest"
            ) from error

    def _prune(self):
        finished = self.finished()
        for path in finished[: len(finished) - self.limit] if self.limit else []:
            gone = path.with_name(f".{path.name}.partial")  # a name that no resume looks at, then gone
            os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def load(self, accelerator, which: str) -> str | None:
        """Restore the checkpoint `which`: "latest" (none yet is fine) or a folder. Returns its name.

        Raises:
            UserError: no such folder.
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
        accelerator.load_state(str(path))
        return path.name


class TrainingLog:
    """training_log.jsonl, written by the main process; lines after `step` are cut off when a run resumes there."""

    def __init__(self, path: Path, active: bool, step: int):
        self.file = None
        if not active:
            return
        kept = []
        if step and path.is_file():
            lines = (
                line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
            )
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, **values):
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()


def save_model(model, processor, output_dir: Path, extra: dict[str, str]):
    """Publish a model: write it completely beside its place, then move each file there.

    Args:
        extra: file name -> text, saved with it.

    Raises:
        UserError: the disk is full; the model that was there is untouched.
    """
    saving = output_dir / ".saving"
    try:
        shutil.rmtree(saving, ignore_errors=True)
        model.save_pretrained(saving)
        processor.save_pretrained(saving)
        for name, text in extra.items():
            (saving / name).write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        shutil.rmtree(saving, ignore_errors=True)
        raise UserError(f"cannot write the model to {output_dir}: {error}; what was there is untouched") from error
    for file in sorted(saving.iterdir()):
        os.replace(file, output_dir / file.name)
    saving.rmdir()
