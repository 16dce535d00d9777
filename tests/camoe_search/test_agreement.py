# SPDX-License-Identifier: Apache-2.0
"""Searching an index ranks videos as evaluating the same files does."""

import json
import shutil
import sys

import evaluate_retrieval
import pytest

from camoe_search.cli import main
from camoe_search.index import VideoIndex


SUBJECTS = ("red star", "small blue disc", "kid", "brick wall", "sandy beach", "gym")
VERBS = ("spins on the beach", "is moving to the left")


@pytest.fixture(scope="module")
def split(some_videos, tmp_path_factory):
    """The clips as a data set with captions, none of which is in the query bank."""
    folder = shutil.copytree(some_videos, tmp_path_factory.mktemp("data") / "clips" / "test")
    rows = [
        {"file_name": path.name, "captions": [f"a {SUBJECTS[i]} {VERBS[i % 2]}"]}
        for i, path in enumerate(sorted(folder.iterdir()))
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, [row["captions"][0] for row in rows]


@pytest.fixture(scope="module")
def scored(checkpoint, split, tmp_path_factory):
    """The results of evaluate_retrieval.py, written where `camoe index` looks for them."""
    folder, _ = split
    run = shutil.copytree(checkpoint, tmp_path_factory.mktemp("runs") / "run")
    command = ["--checkpoint", run, "--dataset_name", folder.parent, "--split", "test", "--validation_split", "null"]
    command += ["--train_split", "null", "--corrections", "[none, query_bank]", "--query_bank_tau", "0.03"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_retrieval.py", *map(str, command), "--num_workers", "0"])
        evaluate_retrieval.main()
    return run, json.loads((run / "eval_results.json").read_text())["results"]


def recall(ranks: list[int], k: int) -> float:
    return 100 * sum(rank <= k for rank in ranks) / len(ranks)


@pytest.mark.parametrize("correction", ["none", "query_bank"])
def test_search_ranks_agree_with_the_evaluation(split, scored, correction, tmp_path, capsys):
    (folder, captions), (run, results) = split, scored
    (tmp_path / "queries.txt").write_text("\n".join(captions))
    place = ["--index", str(tmp_path / "index")]
    main(["index", str(folder), "--model", str(run), "--num-workers", "0", *place])
    assert VideoIndex.load(tmp_path / "index").description.tau == 0.03  # the evaluation's

    def ranks():
        capsys.readouterr()
        main(["search", "--queries", str(tmp_path / "queries.txt"), "-k", "6", "--correction", correction, *place])
        found = [json.loads(line)["hits"] for line in capsys.readouterr().out.splitlines()]
        paths = [[hit["path"] for hit in hits] for hits in found]
        return [1 + paths[i].index(str(folder / f"clip_{i}.mp4")) for i in range(6)]

    before, expected = ranks(), results[correction]["text_to_video"]
    assert len(set(before)) > 1  # otherwise this test would prove little
    for k in (1, 5):
        assert recall(before, k) == pytest.approx(expected[f"R@{k}"])
    assert sum(before) / 6 == pytest.approx(expected["MnR"])

    third = [folder / "clip_1.mp4", folder / "clip_4.mp4"]
    index = VideoIndex.load(tmp_path / "index")
    index.remove(third)
    index.add(third, num_workers=0, text_encoder=False)
    assert ranks() == before
