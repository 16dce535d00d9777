# SPDX-License-Identifier: Apache-2.0
"""Lines say what was measured, met and missed; the page is made from them; a bench that fails stops no other."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import clips
import harness
import run_all
from harness import Line, compare, in_turns

from modeling_camoe.frames import probe_video, sample_frames


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Everything that is written goes here."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    for name, value in (("RESULTS", tmp_path), ("PAGE", tmp_path / "page.md"), ("CHART", tmp_path / "chart.png")):
        monkeypatch.setattr(run_all, name, value)
    (tmp_path / "page.md").write_text("before\n" + run_all.BEGIN + "old\n" + run_all.END + "after\n")
    return tmp_path


def test_a_ratio_is_the_median_of_the_turns_ratios():
    line = compare("a", [1.0, 2.0, 4.0], [3.0, 2.0, 6.0], "peer", scale=1000, unit="ms", goal=1.3)
    assert (line.ours, line.peer, line.ratio, line.spread) == (2000, 3000, 1.5, (1.0, 3.0))
    assert line.met is True
    line = compare("a", [1.0, 2.0, 4.0], [3.0, 2.0, 6.0], "peer", speedup=False, goal=0.6)
    assert line.ratio == pytest.approx(2 / 3) and line.met is False  # at most, where ours is divided by the peer's


def test_calls_take_turns_and_the_order_alternates():
    called = []
    seconds = in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=3)
    assert called == ["a", "b"] + ["a", "b", "b", "a", "a", "b"]  # after the warm-up
    assert [len(of) for of in seconds.values()] == [3, 3]


def test_lines_come_back_as_they_were_written(folder):
    lines = [compare("a", [1.0, 2.0], [3.0, 4.0], "peer", goal=1.0), Line("b", skipped="no GPU")]
    path = harness.write("some", lines, {"size": 3, "folder": Path("/home/somebody"), "kept": Path("runs/demo")})
    assert harness.read(path) == lines
    assert "somebody" not in path.read_text() and "runs/demo" in path.read_text()


def test_the_page_says_what_was_met_missed_and_skipped(folder):
    harness.write(
        "decode", [compare("fast", [1.0], [2.0], "peer", goal=1.3), compare("slow", [2.0], [1.3], "peer", goal=1.3)]
    )
    harness.write("gpu", [Line("card", skipped="no CUDA device")])
    run_all.write_page({name: harness.read(folder / f"{name}.json") for name in ("decode", "gpu")})
    page = (folder / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "1 goals met, 1 missed, 1 lines skipped" in page
    fast, slow, card = (
        next(row for row in page.splitlines() if row.startswith(f"| {name} ")) for name in ("fast", "slow", "card")
    )
    assert fast.endswith("| >= 1.3 | met |")
    assert slow.endswith("| >= 1.3 | **missed by 50 %** |")
    assert "skipped: no CUDA device" in card


def test_a_bench_that_fails_is_named_and_the_others_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "HERE", folder)
    monkeypatch.setattr(run_all, "PROGRAMS", {"broken": [], "slow": [], "good": ["x"]})
    (folder / "broken.py").write_text("raise SystemExit(3)")
    (folder / "slow.py").write_text("import time; time.sleep(60)")
    (folder / "good.py").write_text(
        f"import sys, pathlib; pathlib.Path({str(folder / 'ran')!r}).write_text(sys.argv[1])"
    )
    assert run_all.run(["broken", "slow", "good"], limit=2) == ["broken", "slow"]
    assert (folder / "ran").read_text() == "x"


def test_results_stand_in_the_order_of_the_programs(folder):
    for name in ("aside", "search", "decode", "gradient_cache"):
        harness.write(name, [Line(name, ours=1.0)])
    assert list(run_all.collect()) == ["decode", "gradient_cache", "search", "aside"]


def test_the_chart_is_drawn_of_lines_with_a_goal(folder):
    lines = [compare("fast", [1.0], [2.0], "peer", goal=1.3), Line("only told", ours=3.0), Line("card", skipped="no")]
    run_all.draw({"decode": lines})
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_every_bench_of_the_table_is_a_program():
    here = Path(run_all.__file__).parent
    assert all((here / f"{name}.py").is_file() for name in run_all.PROGRAMS)


def test_a_long_clip_repeats_a_shorter_one(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "REPEATED_SECONDS", 1)
    path = clips.write_clip(tmp_path / "clip.mp4", 3, (64, 48), gop=25)
    assert probe_video(path).duration == pytest.approx(3.0)
    sampled = sample_frames(path, 6, size=32)
    assert len(sampled.times) == 6
    assert (sampled.frames[0].float() - sampled.frames[2].float()).abs().mean() < 1  # a second later, the same picture
