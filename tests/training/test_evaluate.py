# SPDX-License-Identifier: Apache-2.0
"""evaluate_retrieval.py as a user runs it: a checkpoint, a matrix of another system, two runs compared, mistakes."""

import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from prepare_benchmark import FEATURES
from safetensors.torch import save_file

from data.errors import UserError
from engine.checkpoint_inputs import CheckpointInputs, equal_captions
from evaluation.compare_runs import RunRanks, compare_runs, load_run, query_key
from evaluation.protocol import Ranks, recalls
from evaluation.scoring import score_retrieval
from tests.programs import run_processes, run_program
from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


NUM_CLIPS = {"train": 6, "validation": 6, "test": 9}
NOUNS = "dog cat horse bird fish cow fox owl bee".split()


def caption(split, n, second=False):
    return f"a {split} {NOUNS[n]} {'sleeps on the grass' if second else 'runs'} {n}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tables of three splits of real videos, all different; two captions a clip."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in NUM_CLIPS.items():
        rows = []
        for n in range(count):
            colours = generator.integers(0, 256, size=(4, 4, 4, 3))
            pictures = colours.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)  # four pictures of 32 x 32
            path = write_video(folder / f"{split}{n}.mp4", num_frames=4, fps=4, size=(32, 32), pictures=pictures)
            captions = [caption(split, n), caption(split, n, second=True)]
            rows.append(
                {"video_id": f"{split}{n}", "video": str(path), "captions": captions, "start": None, "end": None}
            )
        datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = tiny_model_and_processor()
    processor.tagger = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    bank = [caption("train", n, second) for n in range(6) for second in (False, True)]
    (folder / "query_bank.txt").write_text("".join(f"{text}\n" for text in bank))
    return folder


EVERYTHING = "[dual_softmax, query_bank, dynamic_query_bank, sinkhorn]"


def arguments(checkpoint, data, output, *more):
    given = ("--checkpoint", checkpoint, "--dataset_name", data, "--output_dir", output, "--num_workers", 0)
    return (*given, "--bootstrap", 100, *more)


def evaluate(*given):
    done = run_program("evaluate_retrieval.py", *given)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_of(*given) -> str:
    done = run_program("evaluate_retrieval.py", *given)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture(scope="module")
def run(checkpoint, data, tmp_path_factory):
    """An evaluation with every correction and all captions."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate(*arguments(checkpoint, data, folder, "--captions", "all", "--corrections", EVERYTHING))
    return folder


def results_of(folder) -> dict:
    return json.loads((folder / "eval_results.json").read_text())


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def test_every_correction_is_reported_with_its_temperature_and_what_it_sees(run):
    results = results_of(run)
    assert list(results["results"]) == ["none", "dual_softmax", "query_bank", "dynamic_query_bank", "sinkhorn"]
    for directions in results["results"].values():
        assert list(directions) == ["text_to_video", "video_to_text", "video_to_text_caption_max"]
        for metrics in directions.values():
            low, high = metrics["R@1_ci95"]
            assert 0 <= low <= metrics["R@1"] <= high <= 100
    assert (results["num_texts"], results["num_videos"]) == (18, 9)
    for name in ("dual_softmax_temp", "tau", "sinkhorn_temp"):
        assert results["settings"][name] > 0
        assert results["temperatures_from"][name] == "best text-to-video R@1 on split 'validation'"
    assert results["temperatures_from"]["video_tau"] == "best video-to-text R@1 on split 'validation'"
    transductive = {name for name, note in results["notes"].items() if note.startswith("transductive")}
    assert transductive == {"dual_softmax", "sinkhorn"}
    assert results["settings"]["text_bank"] == 12 and results["settings"]["video_bank"] == 6


def test_captions_that_are_also_another_videos_are_counted():
    captions = ["a dog runs", "A  dog runs", "a cat", "a cat", "a cow"]
    assert equal_captions(captions, [0, 1, 2, 2, 3]) == 2  # two captions of one video may be equal


def test_the_results_say_how_many_captions_are_also_another_videos(run):
    assert results_of(run)["equal_captions"] == 0


def test_the_ranks_beside_the_results_are_theirs(run):
    ranks = load_run(run / "eval_results.json")
    results = results_of(run)["results"]
    for correction, directions in ranks.ranks.items():
        for direction, of_queries in directions.items():
            for name, value in recalls(of_queries).items():
                assert results[correction][direction][name] == pytest.approx(value)
    keys = [query_key(f"test{n}", caption("test", n, second)) for n in range(9) for second in (False, True)]
    assert ranks.keys["text_to_video"].tolist() == keys
    assert ranks.keys["video_to_text"].tolist() == [query_key(f"test{n}") for n in range(9)]


def test_two_processes_write_the_results_of_one(checkpoint, data, run, tmp_path):
    given = arguments(checkpoint, data, tmp_path, "--captions", "all", "--corrections", EVERYTHING)
    done = run_processes(2, "evaluate_retrieval.py", *given)
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    assert (tmp_path / "eval_results.json").read_bytes() == (run / "eval_results.json").read_bytes()
    assert (tmp_path / "eval_ranks.safetensors").read_bytes() == (run / "eval_ranks.safetensors").read_bytes()


@pytest.fixture
def leaky(checkpoint, tmp_path):
    folder = tmp_path / "leaky"
    shutil.copytree(checkpoint, folder)
    with (folder / "query_bank.txt").open("a") as file:
        file.write("A  test owl runs 7\n")  # case and spaces do not hide it
    return folder


def test_a_test_caption_in_the_query_bank_is_refused_on_request(leaky, data, tmp_path):
    message = error_of(*arguments(leaky, data, tmp_path, "--on_leak", "raise"))
    assert "query_bank.txt holds 1 of the captions that are scored, 'A test owl runs 7'" in message
    assert "--on_leak drop" in message
    assert not (tmp_path / "eval_results.json").exists()


def test_a_test_clip_in_the_video_bank_is_refused(checkpoint, data, tmp_path):
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_parquet(str(data / f"{split}.parquet"))
        if split == "train":
            rows = datasets.concatenate_datasets([rows, datasets.Dataset.from_parquet(str(data / "test.parquet"))])
            rows = rows.select(range(NUM_CLIPS["train"] + 1))  # the first test clip is among them
        rows.to_parquet(tmp_path / "leaky" / f"{split}.parquet")
    more = ("--train_split", "train", "--corrections", "[query_bank]", "--on_leak", "drop")  # drops captions only
    message = error_of(*arguments(checkpoint, tmp_path / "leaky", tmp_path, *more))
    assert "split 'train' holds 1 of the clips that are scored" in message and "test0.mp4" in message
    assert not (tmp_path / "eval_results.json").exists()


def test_a_leaked_caption_is_left_out_of_the_bank_counted_and_said(leaky, data, tmp_path):
    said = evaluate(*arguments(leaky, data, tmp_path, "--corrections", "[query_bank]"))
    assert "left 1 captions out of the query bank: they are scored, too" in said
    results = results_of(tmp_path)
    assert results["bank_captions_left_out"] == 1 and results["settings"]["text_bank"] == 12


def test_the_bank_of_clips_is_a_sample_of_the_training_clips_not_the_first_of_them(tmp_path):
    rows = [json.dumps({"video": f"{n}.mp4", "caption": f"caption {n}"}) for n in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    inputs = CheckpointInputs.__new__(CheckpointInputs)
    inputs.processor = SimpleNamespace(experts=["fusion"])
    inputs.options = SimpleNamespace(
        dataset_name=str(tmp_path), dataset_config=None, train_split="train", bank=20, seed=0, video_column="video",
        caption_column=None, video_root=None,
    )  # fmt: skip
    chosen = [int(name) for name in inputs._bank_clips().video_ids]
    assert len(set(chosen)) == 20 and chosen == sorted(chosen) and sum(n >= 50 for n in chosen) >= 5
    assert chosen == [int(name) for name in inputs._bank_clips().video_ids]
    inputs.options.bank = 1000
    assert len(inputs._bank_clips().video_ids) == 100


@pytest.mark.parametrize(("more", "of_clips"), [([], 0.3), (["--video_bank_tau", 0.1], 0.1)])
def test_a_given_tau_is_for_both_banks_unless_the_clips_have_their_own(checkpoint, data, tmp_path, more, of_clips):
    given = "--corrections", "[query_bank]", "--query_bank_tau", 0.3, "--bootstrap", 0
    evaluate(*arguments(checkpoint, data, tmp_path, *given, *more))
    results = results_of(tmp_path)
    assert (results["settings"]["tau"], results["settings"]["video_tau"]) == (0.3, of_clips)
    assert results["temperatures_from"] == {"tau": "given", "video_tau": "given"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--validation_split", "test"], ["--validation_split is 'test', the split that is scored", "null"]),
        (["--train_split", "test"], ["--train_split is 'test', the split that is scored"]),
        (["--validation_split", "null"], ["dual_softmax needs a temperature", "--dual_softmax_temp"]),
        (["--corrections", "[dualsoftmax]"], ["'dualsoftmax'", "did you mean 'dual_softmax'?"]),
        (["--split", "tset"], ["no split 'tset'"]),
        (["--compare", "nowhere.json"], ["cannot read the results nowhere.json"]),
        (["--dual_softmax_temp", "0"], ["'dual_softmax_temp' must be more than 0"]),
        (["--scores", "a.npy"], ["one of --checkpoint, --scores and --results"]),
    ],
)
def test_a_wrong_option_is_one_line_with_remedy(checkpoint, data, tmp_path, more, words):
    message = error_of(*arguments(checkpoint, data, tmp_path, *more))
    for part in words:
        assert part in message


# --- a matrix of another system --------------------------------------------------------------------------------------


@pytest.fixture
def matrix():
    """18 texts, 9 videos, as the test split has them."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(18, 9, generator=generator) + torch.eye(9).repeat_interleave(2, dim=0) * 0.3


def test_a_matrix_is_scored_as_vectors_are(matrix, tmp_path):
    np.save(tmp_path / "theirs.npy", matrix.numpy())
    (tmp_path / "columns.txt").write_text("".join(f"{n // 2}\n" for n in range(18)))
    printed = evaluate(
        "--scores", tmp_path / "theirs.npy", "--text_to_video_ids", tmp_path / "columns.txt", "--scale", 20,
        "--corrections", "[dual_softmax, sinkhorn]", "--dual_softmax_temp", 2, "--sinkhorn_temp", 0.1,
    )  # fmt: skip
    results = results_of(tmp_path / "theirs")
    expected = score_retrieval(
        matrix, None, torch.arange(18) // 2, scale=20, corrections=("dual_softmax", "sinkhorn"), dual_softmax_temp=2,
        sinkhorn_temp=0.1,
    )  # fmt: skip
    assert results["results"] == expected.to_dict()["results"]
    assert results["dataset"] == "theirs" and results["temperatures_from"]["dual_softmax_temp"] == "given"
    assert "caption max" in printed and "transductive" in printed


def test_three_ways_to_say_whose_text_a_row_is_give_the_same(matrix, data, tmp_path):
    np.save(tmp_path / "a.npy", matrix.numpy())
    (tmp_path / "ids.json").write_text(json.dumps([f"test{n // 2}" for n in range(18)]))
    (tmp_path / "columns.txt").write_text("".join(f"test{n}\n" for n in range(9)))
    save_file({"scores": matrix, "text_to_video": torch.arange(18) // 2}, tmp_path / "b.safetensors")
    ways = {
        "split": ("a.npy", "--dataset_name", data, "--captions", "all"),
        "ids": ("a.npy", "--text_to_video_ids", tmp_path / "ids.json", "--video_ids", tmp_path / "columns.txt"),
        "tensor": ("b.safetensors",),
    }
    found = {}
    for name, (file, *more) in ways.items():
        evaluate("--scores", tmp_path / file, *more, "--output_dir", tmp_path / name)
        found[name] = results_of(tmp_path / name)["results"]
    assert found["split"] == found["ids"] == found["tensor"]
    assert found["split"]["none"]["text_to_video"]["R@1"] > 20


def test_a_matrix_takes_banks_and_validation_data_as_matrices(matrix, tmp_path):
    generator = torch.Generator().manual_seed(1)
    bank, validation = torch.rand(30, 9, generator=generator), torch.rand(7, 7, generator=generator)
    for name, scores in (("theirs", matrix[::2]), ("bank", bank), ("validation", validation)):
        np.save(tmp_path / f"{name}.npy", scores.numpy())
    evaluate(
        "--scores", tmp_path / "theirs.npy", "--text_bank_scores", tmp_path / "bank.npy", "--query_bank_tau", 0.05,
        "--corrections", "[query_bank, dual_softmax]", "--validation_scores", tmp_path / "validation.npy",
    )  # fmt: skip
    results = results_of(tmp_path / "theirs")
    chosen = results["settings"]["dual_softmax_temp"]
    expected = score_retrieval(
        matrix[::2], None, corrections=("query_bank", "dual_softmax"), text_bank=bank, dual_softmax_temp=chosen
    )
    assert results["results"] == expected.to_dict()["results"]
    assert "validation.npy" in results["temperatures_from"]["dual_softmax_temp"]


MATRIX_MISTAKES = {
    "rectangular": (np.zeros((18, 9)), [], ["18 texts and 9 videos", "--text_to_video_ids"]),
    "turned": (
        np.zeros((9, 18)),
        ["--text_to_video_ids", "columns.txt", "--video_ids", "names.txt"],
        ["transpose it"],
    ),
    "nan": (np.full((3, 3), np.nan), [], ["(text 0, video 0) is not a finite number"]),
    "strings": (np.array([["a", "b"]] * 2), [], ["not numbers"]),
    "cube": (np.zeros((2, 2, 2)), [], ["must be (texts, videos)"]),
    "column": (np.zeros((18, 5)), ["--text_to_video_ids", "columns.txt"], ["entry 11: no column for video '5'"]),
    "bank": (np.zeros((4, 4)), ["--corrections", "[query_bank]"], ["--text_bank_scores", "leave it out"]),
    "temperature": (np.zeros((4, 4)), ["--corrections", "[sinkhorn]"], ["sinkhorn needs a temperature"]),
}


@pytest.mark.parametrize("name", MATRIX_MISTAKES)
def test_a_mistake_with_a_matrix_is_one_line_with_remedy(tmp_path, name):
    scores, more, words = MATRIX_MISTAKES[name]
    np.save(tmp_path / "scores.npy", scores)
    (tmp_path / "columns.txt").write_text("".join(f"{n // 2}\n" for n in range(18)))
    (tmp_path / "names.txt").write_text("".join(f"{n}\n" for n in range(9)))
    more = [tmp_path / word if word.endswith(".txt") else word for word in more]
    message = error_of("--scores", tmp_path / "scores.npy", *more)
    for part in words:
        assert part in message


# --- two runs --------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_query_by_query(matrix, run, data, tmp_path):
    np.save(tmp_path / "perfect.npy", torch.eye(9).repeat_interleave(2, dim=0).numpy())
    printed = evaluate(
        "--scores", tmp_path / "perfect.npy", "--dataset_name", data, "--captions", "all", "--compare",
        run / "eval_results.json",
    )  # fmt: skip
    test = results_of(tmp_path / "perfect")["comparison"]["tests"]["none"]["text_to_video"]["R@1"]
    theirs = results_of(run)["results"]["none"]["text_to_video"]["R@1"]
    assert test["difference"] == pytest.approx(100 - theirs) and test["num_queries"] == 18
    assert test["ci95"][0] > 0 and test["p_value"] < 0.05
    assert "on the same queries" in printed and f"{100 - theirs:+.1f}" in printed

    again = evaluate("--results", run / "eval_results.json", "--compare", tmp_path / "perfect" / "eval_results.json")
    assert f"{theirs - 100:+.1f}" in again


def test_other_queries_or_ranks_of_another_run_are_refused(matrix, run, tmp_path):
    np.save(tmp_path / "other.npy", np.eye(9))
    evaluate("--scores", tmp_path / "other.npy")
    other = tmp_path / "other" / "eval_results.json"
    message = error_of("--results", run / "eval_results.json", "--compare", other)
    assert "was scored on other queries (text_to_video: 18 here, 9 there, 0 in both)" in message

    (tmp_path / "other" / "eval_ranks.safetensors").write_bytes((run / "eval_ranks.safetensors").read_bytes())
    assert "holds the ranks of another run" in error_of("--results", run / "eval_results.json", "--compare", other)
    (tmp_path / "other" / "eval_ranks.safetensors").unlink()
    assert "eval_ranks.safetensors is missing" in error_of("--results", other, "--compare", run / "eval_results.json")


def test_queries_in_another_order_are_matched_by_their_keys():
    ranks, keys = Ranks(np.arange(20), np.zeros(20)), np.random.default_rng(0).integers(-(2**62), 2**62, size=20)
    shuffled = np.random.default_rng(1).permutation(20)

    def run(order):
        return RunRanks(
            {"none": {"text_to_video": ranks[order]}},
            {"text_to_video": np.arange(20)[order]},
            {"text_to_video": keys[order]},
        )

    tests = compare_runs(run(np.arange(20)), run(shuffled))["none"]["text_to_video"]
    assert tests["R@1"]["difference"] == 0 and tests["R@1"]["ci95"] == [0, 0] and tests["R@5"]["p_value"] == 1
    with pytest.raises(UserError, match="19 in both"):
        other = run(shuffled)
        other.keys["text_to_video"][3] += 1
        compare_runs(run(np.arange(20)), other)
