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
"""Score a CAMoE checkpoint on a split: both directions, uncorrected, dual softmax and query bank.

    python training/evaluate_retrieval.py --checkpoint runs/demo --dataset_name data/motion_demo --split test

Prints a table and writes eval_results.json into `output_dir` (the checkpoint's folder by default). Temperatures of the
corrections are chosen on the validation split, never on the one that is scored; every number says which correction it
used, and which of them see all test queries at once.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from build import load_checkpoint
from encode_split import encode_split
from recipe import UserError, exit_on_user_error, option, parse_options
from retrieval_data import load_split, read_captioned_clips
from scoring import choose_temperature, results_table, score_retrieval, write_results

from modeling_camoe.encode import encode_texts


@dataclass
class EvaluationOptions:
    """Everything that an evaluation is told."""

    checkpoint: str = option(help="CAMoE checkpoint, folder or Hub id")
    dataset_name: str = option(help="folder of clips with metadata.jsonl, folder of tables, or Hub id")
    dataset_config: str | None = option(None, "configuration of a Hub data set")
    split: str = option("test", "split to score")
    validation_split: str | None = option("validation", "split that chooses the corrections' temperatures")
    train_split: str | None = option("train", "split whose clips are the bank for video to text")
    captions: str = option("first", "queries: the first caption of every clip, or all", choices=("first", "all"))
    video_column: str = option("video", "column of video paths")
    caption_column: str | None = option(None, "column of captions (default: captions or caption)")
    video_root: str | None = option(None, "folder that relative video paths are relative to")
    max_clips: int | None = option(None, "keep only the first clips, for a quick look")
    corrections: list = option(["none", "dual_softmax", "query_bank"], "corrections to report; none always is")
    dual_softmax_temp: float | None = option(None, "temperature of test-time dual softmax (default: from validation)")
    query_bank_tau: float | None = option(None, "temperature of the query bank (default: from validation)")
    bank: int = option(1000, "size of the banks: captions of query_bank.txt, and training clips")
    on_bad_video: str = option(
        "raise", "a clip that cannot be decoded: stop, or skip and list", choices=("raise", "skip")
    )
    batch_size: int = option(32, "clips a forward pass")
    num_workers: int = option(2, "processes that decode")
    output_dir: str | None = option(None, "where eval_results.json goes (default: the checkpoint's folder)")


# Tried on validation data. Dual softmax: logits / temp. Query bank: units of the score itself, in [-1, 1].
DUAL_SOFTMAX_TEMPS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
QUERY_BANK_TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Evaluation:
    """A checkpoint and what it is scored with: encodes splits and banks once, on all processes.

    Args:
        options: [`EvaluationOptions`]. accelerator: of the run.
    """

    def __init__(self, options: EvaluationOptions, accelerator: Accelerator):
        self.options = options
        self.accelerator = accelerator
        self.model, self.processor = load_checkpoint(options.checkpoint)
        self.model = self.model.to(accelerator.device).eval()

    @property
    def scale(self) -> float:
        return self.model.clip.logit_scale.exp().item()

    def encode(self, split: str, limit: int | None = None, captions: str | None = None):
        options = self.options
        with self.accelerator.main_process_first():
            clips = read_captioned_clips(
                load_split(options.dataset_name, split, options.dataset_config, limit),
                self.processor.experts,
                self.processor.tagger,
                self.processor.streams,
                options.video_column,
                options.caption_column,
                options.video_root,
            )
        encoded = encode_split(
            self.accelerator,
            self.model,
            self.processor,
            clips,
            captions or options.captions,
            options.batch_size,
            options.num_workers,
            options.on_bad_video,
            progress=f"{split} split",
        )
        if not encoded.video_rows:
            raise UserError(f"no clip of split {split!r} could be decoded; the first: {encoded.bad[0].cause}")
        return encoded

    def text_bank(self, test_captions: list[str]):
        """Vectors of the checkpoint's query bank; refuses a bank that holds a test query."""
        path = Path(self.options.checkpoint) / "query_bank.txt"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: the query bank needs training captions; train with training/run_retrieval.py, "
                "which writes it, or leave query_bank out of --corrections"
            )
        bank = path.read_text(encoding="utf-8").splitlines()
        leaked = sorted({" ".join(text.split()) for text in test_captions} & set(bank))
        if leaked:
            raise UserError(
                f"{path} holds {len(leaked)} of the captions that are scored, {leaked[0]!r} among them: a query "
                "bank must be training captions; remove them from the file"
            )
        step = max(1, len(bank) // self.options.bank)  # spread over the file
        chosen = bank[::step][: self.options.bank]
        return encode_texts(self.model, self.processor, chosen, progress="query bank: captions")


def evaluate(options: EvaluationOptions, accelerator: Accelerator) -> dict:
    """Everything that eval_results.json holds."""
    evaluation = Evaluation(options, accelerator)
    test = evaluation.encode(options.split, options.max_clips)
    corrections = ["none", *(name for name in options.corrections if name != "none")]
    needs_bank = any("query_bank" in name for name in corrections)
    banks = {}
    if needs_bank:
        banks["text_bank"] = evaluation.text_bank(test.captions)
        if options.train_split is not None:
            banks["video_bank"] = evaluation.encode(options.train_split, options.bank).video_vectors

    chosen = {"dual_softmax_temp": options.dual_softmax_temp, "tau": options.query_bank_tau}
    origin = {name: "given" for name, value in chosen.items() if value is not None}
    wanted = [
        ("dual_softmax_temp", "dual_softmax", DUAL_SOFTMAX_TEMPS, {}),
        ("tau", "query_bank", QUERY_BANK_TAUS, {"text_bank": banks.get("text_bank")}),
    ]
    validation = None
    for name, correction, candidates, bank in wanted:
        if chosen[name] is not None or not any(correction in other for other in corrections):
            continue
        if options.validation_split is None:
            raise UserError(
                f"{correction} needs a temperature: give a --validation_split that chooses it, or --{name}"
            )
        if validation is None:
            validation = evaluation.encode(options.validation_split)
        chosen[name] = choose_temperature(
            validation.text_vectors,
            validation.video_vectors,
            validation.video_of_text,
            candidates=candidates,
            correction=correction,
            scale=evaluation.scale,
            **bank,
        )
        origin[name] = f"best R@1 on split {options.validation_split!r}"

    scored = score_retrieval(
        test.text_vectors,
        test.video_vectors,
        test.video_of_text,
        scale=evaluation.scale,
        corrections=corrections,
        **{name: value for name, value in chosen.items() if value is not None},
        **banks,
    )
    return {
        "dataset": Path(options.dataset_name).name,
        "split": options.split,
        "captions": options.captions,
        "checkpoint": options.checkpoint,
        **scored.to_dict(),
        "temperatures_from": origin,
        "bad_videos": [{"source": bad.source, "cause": bad.cause} for bad in test.bad],
    }


def main():
    options = parse_options(EvaluationOptions, description=__doc__)
    accelerator = Accelerator()
    results = evaluate(options, accelerator)
    if accelerator.is_main_process:
        path = Path(options.output_dir or options.checkpoint) / "eval_results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, results)
        print(results_table(results))
        if results["bad_videos"]:
            print(f"left out {len(results['bad_videos'])} clips that could not be decoded; they are listed in {path}")
        print(f"wrote {path}")
    accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)
