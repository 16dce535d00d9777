# SPDX-License-Identifier: Apache-2.0
"""Measured and published results, side by side and never mixed up."""

import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def table(results: Path) -> subprocess.CompletedProcess:
    program = ROOT / "hub_cards" / "results_table.py"
    return subprocess.run(
        [sys.executable, str(program), "--results", str(results)], capture_output=True, text=True, timeout=60
    )


def test_measured_and_published_rows_of_a_split_share_a_table(tmp_path):
    metrics = {"R@1": 12.34, "R@1_ci95": [10.0, 14.5], "R@5": 30.0, "R@10": 41.0, "MdR": 17.0, "MnR": 60.5}
    directions = {"text_to_video": metrics, "video_to_text": metrics}
    run = {"dataset": "msrvtt", "split": "test_1k", "results": {"none": directions, "dual_softmax": directions}}
    (tmp_path / "tiny.json").write_text(json.dumps(run))
    done = table(tmp_path)
    assert done.returncode == 0, done.stderr
    first = done.stdout.split("## ")[1]
    assert first.startswith("msrvtt, test_1k")
    lines = done.stdout.splitlines()
    measured = [line for line in lines if line.startswith("| measured")]
    assert measured[0] == (
        "| measured | tiny | none | 12.3 (10.0 to 14.5) | 30.0 | 41.0 | 17.0 | 60.5 | measured here, tiny.json |"
    )
    assert len(measured) == 4  # two corrections, two directions
    published = next(line for line in lines if "CLIP4Clip seqTransf" in line)
    assert published.startswith("| published |") and "| 44.5 | 71.4 | 81.6 | 2.0 | 15.3 |" in published
    assert "2104.08860" in published


def test_every_published_row_names_its_source():
    rows = json.loads((ROOT / "hub_cards" / "published_results.json").read_text())
    assert rows and all(row["source"] and row["correction"] for row in rows)
    assert {row["dataset"] for row in rows} == {"msrvtt", "msvd", "lsmdc", "didemo", "activitynet"}


def test_a_file_that_is_not_a_result_is_a_one_line_error(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    done = table(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "other.json has no 'dataset'" in done.stderr and "eval_results.json" in done.stderr
