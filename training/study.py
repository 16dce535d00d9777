# SPDX-License-Identifier: Apache-2.0
"""Studies of trained checkpoints that their scores do not answer.

    python training/study.py banks --checkpoint runs/demo --home data/motion_ablations \
        --tests '{test A: data/motion_test_a}' --output training/results/banks.json
    python training/study.py experts --checkpoints '{demo: runs/demo}' --dataset_name data/motion_ablations \
        --columns '[action]' --output training/results/experts.json

`banks`: what a query bank is worth, by size and kind, against dual softmax, single-query Sinkhorn and a share of the
test queries. Every temperature is chosen on the validation split of `home`, banks are of its training split.
`experts`: each expert's gate, cosines, spread and R@1, alone and left out, and by the values of columns.

Prints the tables in Markdown and writes all numbers as JSON.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from data.captioned_clips import load_split
from data.errors import UserError
from data.files import write_json
from engine.ablation_tests import TestInputs
from engine.evaluation_options import EvaluationOptions
from engine.recipe import exit_on_user_error, option, parse_options
from evaluation import bank_study, expert_study
from modeling_camoe.encode import encode_texts


@dataclass
class BankOptions:
    """Of `banks`."""

    checkpoint: str = option(help="trained CAMoE")
    home: str = option(help="data set that it was trained on: its validation and training splits are used")
    tests: dict = option(help="name -> data set whose test split is scored")
    output: str = option(help="JSON file for the results")
    sizes: list = option([256, 1000, 3000, 10000], "sizes of the banks")
    frame_cache: str | None = option(None, "folder in which sampled frames are kept")
    seed: int = option(0, "of what is drawn")


@dataclass
class ExpertOptions:
    """Of `experts`."""

    checkpoints: dict = option(help="name -> trained CAMoE")
    dataset_name: str = option(help="data set whose split is encoded")
    output: str = option(help="JSON file for the results")
    split: str = option("validation", "its split")
    columns: list = option([], "columns of the data set by whose values queries are told apart")
    frame_cache: str | None = option(None, "folder in which sampled frames are kept")


def study_banks(options: BankOptions) -> str:
    """Write the results of `banks`, and return their tables."""
    common = EvaluationOptions(
        checkpoint=options.checkpoint,
        dataset_name=options.home,
        frame_cache=options.frame_cache,
        num_workers=0,
        bank=max(options.sizes),
        seed=options.seed,
    )
    tests = [{"name": name, "dataset_name": folder} for name, folder in options.tests.items()]
    inputs = TestInputs(common, Accelerator(), tests)
    validation = inputs.own[0]
    clips = inputs.banks(validation)["video_bank"]
    own = {" ".join(text.lower().split()) for text in inputs.test_captions}
    texts, streams, _ = inputs._read(common.train_split).flat("all")
    kept = [n for n, text in enumerate(texts) if " ".join(text.lower().split()) not in own]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(options.seed))[: max(options.sizes)]
    experts = inputs.model.config.experts
    tagged = [dict(zip(experts, streams[kept[n]], strict=True)) for n in order.tolist()]
    captions = encode_texts(inputs.model, inputs.processor, tagged, progress="captions of the bank")
    # Among texts, and among clips, the experts count alike: the gate is the candidate's.
    plain_clips = torch.nn.functional.normalize(clips.unflatten(1, (len(experts), -1)), dim=-1).flatten(1)
    results = {"settings": dataclasses.asdict(options), "tests": {}}
    for direction in bank_study.DIRECTIONS:
        by_text = direction == "text_to_video"
        usual, other = (captions, plain_clips) if by_text else (clips, captions / len(experts))
        names = ("captions", "clips") if by_text else ("clips", "captions")
        banks = {
            f"{size:,} {name}": bank[:size]
            for name, bank in zip(names, (usual, other), strict=True)
            for size in sorted({min(size, len(bank)) for size in options.sizes})
        }
        study = bank_study.Study(banks, inputs.scale, options.seed)

        def sides(data, by_text=by_text):
            if not torch.equal(data.video_of_text, torch.arange(len(data.text_vectors))):
                raise UserError("this study takes one caption a clip, in the order of the clips")
            pair = data.text_vectors, data.video_vectors
            return pair if by_text else pair[::-1]

        chosen = study.choose(*sides(validation))
        for name, data in {"validation": validation, **inputs.tests}.items():
            results["tests"].setdefault(name, {})[direction] = study.score(*sides(data), chosen)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)
    return bank_study.table(results)


def study_experts(options: ExpertOptions) -> str:
    """Write the results of `experts`, and return their tables."""
    parts, results = [], {"settings": dataclasses.asdict(options), "checkpoints": {}}
    rows = load_split(options.dataset_name, options.split)
    for name, checkpoint in options.checkpoints.items():
        common = EvaluationOptions(
            checkpoint=checkpoint,
            dataset_name=options.dataset_name,
            split="test" if options.split != "test" else "validation",  # is not read
            validation_split=options.split,
            frame_cache=options.frame_cache,
            num_workers=0,
        )
        inputs = TestInputs(common, Accelerator(), [])
        vectors, experts = (inputs.own[0].text_vectors, inputs.own[0].video_vectors), inputs.model.config.experts
        found = {"experts": expert_study.study(*vectors, experts)}
        for column in options.columns:
            found[f"by_{column}"] = expert_study.by_value(*vectors, experts, list(rows[column]))
        results["checkpoints"][name] = found
        parts.append(f"{name}\n\n{expert_study.table(found['experts'])}")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)
    return "\n\n".join(parts)


STUDIES = {"banks": (BankOptions, study_banks), "experts": (ExpertOptions, study_experts)}


def main():
    name, *words = sys.argv[1:] or ["--help"]
    if name not in STUDIES:
        if name in ("-h", "--help"):
            print(__doc__)
            return
        raise UserError(f"the first argument is {' or '.join(STUDIES)}, not {name!r}")
    options_class, study = STUDIES[name]
    print(study(parse_options(options_class, words, description=__doc__)))


if __name__ == "__main__":
    exit_on_user_error(main)
