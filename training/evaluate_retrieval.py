# SPDX-License-Identifier: Apache-2.0
"""Score a checkpoint, or a matrix of scores from any system: both directions, with and without corrections.

    python training/evaluate_retrieval.py --checkpoint runs/demo --dataset_name data/motion_demo --split test
    python training/evaluate_retrieval.py --scores theirs.npy --dataset_name data/msrvtt --split test_1k
    python training/evaluate_retrieval.py --results runs/a/eval_results.json --compare runs/b/eval_results.json

Prints a table and writes eval_results.json and eval_ranks.safetensors (the rank of every query) into `output_dir`.
Every number says which correction it used, and whether that sees all test queries at once. Temperatures of the
corrections are chosen on validation data, never on the split that is scored. `--compare` tests the difference to
another run on the same queries. Under `accelerate launch` encoding and scoring are shared out, and the results are
those of one process. docs/evaluation.md explains protocols and corrections.
"""

from pathlib import Path

from accelerate import Accelerator

from data.errors import UserError
from data.files import write_json
from engine.checkpoint_inputs import CheckpointInputs
from engine.evaluation_options import EvaluationOptions, choose_temperatures
from engine.matrix_inputs import MatrixInputs
from engine.recipe import exit_on_user_error, parse_options
from evaluation.compare_runs import RANKS_FILE, RunRanks, compare_runs, comparison_table, load_run
from evaluation.scoring import results_table, score_retrieval


def evaluate(options: EvaluationOptions, accelerator: Accelerator) -> tuple[dict, RunRanks]:
    """Everything that eval_results.json holds, and the ranks that go beside it."""
    source = MatrixInputs(options) if options.scores is not None else CheckpointInputs(options, accelerator)
    if options.corrections is None:
        options.corrections = source.default_corrections()
    test = source.test()
    banks = source.banks(test) if any("query_bank" in name for name in options.corrections) else {}
    world, on_gpu = accelerator.num_processes, accelerator.device.type == "cuda"
    how = {"device": str(accelerator.device) if on_gpu else "cpu"}
    if world > 1:
        how["shard"] = accelerator.process_index, world
        how["gather"] = lambda tensor: accelerator.gather(tensor[None])
    try:
        chosen, origin = choose_temperatures(options, source, banks, how)
        scored = score_retrieval(
            **test.data(),
            bootstrap=options.bootstrap,
            seed=options.seed,
            scale=source.scale,
            corrections=options.corrections,
            **chosen,
            **banks,
            **how,
        )
    except ValueError as error:  # a score that is not finite, banks that do not fit
        raise UserError(f"{options.scores or options.checkpoint}: {error}") from error
    results = {**source.about, **scored.to_dict(), "temperatures_from": origin, "ranks": RANKS_FILE}
    return results, RunRanks(scored.ranks, scored.groups, test.keys_of(scored.groups))


def compare(options: EvaluationOptions, mine: RunRanks, other: RunRanks) -> dict:
    """Print the paired test, and return what eval_results.json says of it."""
    tests = compare_runs(mine, other, options.compare)
    print(f"\nthis run minus {options.compare}, on the same queries:\n{comparison_table(tests)}")
    return {"with": options.compare, "tests": tests}


def main():
    options = parse_options(EvaluationOptions, description=__doc__)
    other = load_run(options.compare) if options.compare is not None else None  # before hours of encoding
    if options.results is not None:
        compare(options, load_run(options.results), other)
        return
    accelerator = Accelerator()
    results, ranks = evaluate(options, accelerator)
    if accelerator.is_main_process:
        folder = Path(options.output_dir or options.checkpoint or Path(options.scores).with_suffix(""))
        folder.mkdir(parents=True, exist_ok=True)
        print(results_table(results))
        if other is not None:
            results["comparison"] = compare(options, ranks, other)
        write_json(folder / "eval_results.json", results)
        ranks.save(folder / RANKS_FILE)
        if results.get("bank_captions_left_out"):
            print(f"left {results['bank_captions_left_out']} captions out of the query bank: they are scored, too")
        if results.get("equal_captions"):
            print(
                f"{results['equal_captions']} of the captions are also another video's, which counts as a wrong answer"
            )
        bad = results.get("bad_videos")
        if bad:
            print(f"left out {len(bad)} clips that could not be decoded; they are listed in the results")
        if results.get("damaged_videos"):
            print(
                f"took frames of {len(results['damaged_videos'])} clips around damage; they are listed in the results"
            )
        print(f"wrote {folder / 'eval_results.json'} and {RANKS_FILE}")
    accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)
