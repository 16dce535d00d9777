# SPDX-License-Identifier: Apache-2.0
"""The command `camoe`: results, pictures, and one-line errors."""

import csv
import json
import subprocess
import sys

import pytest
from PIL import Image

from camoe_search.cli import main
from camoe_search.index import VideoIndex
from camoe_search.show import format_time


QUERY = "a red star spins"


@pytest.fixture(scope="module")
def index(some_videos, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "index"
    main(["index", str(some_videos), "--model", str(checkpoint), "--index", str(folder), "--num-workers", "0"])
    return str(folder)


def run(capsys, *arguments) -> str:
    main(list(map(str, arguments)))
    return capsys.readouterr().out


def error_line(capsys, *arguments) -> str:
    """The last line on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.splitlines()[-1]


def test_help_does_not_wait_for_torch():
    code = "import sys, camoe_search.cli as c\ntry: c.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "calibrate" in done.stdout


def test_json_table_and_python_agree(index, capsys):
    hits = VideoIndex.load(index).search(QUERY, k=3)
    rows = json.loads(run(capsys, "search", QUERY, "--index", index, "-k", "3", "--json"))
    assert [row["path"] for row in rows] == [hit.path for hit in hits]
    assert [row["rank"] for row in rows] == [1, 2, 3] and rows[0].keys() >= {"score", "start", "end"}
    table = run(capsys, "search", QUERY, "--index", index, "-k", "3").splitlines()
    assert [line.split()[-1] for line in table[1:]] == [hit.path for hit in hits]


def test_options_reach_the_search(index, capsys):
    options = ["--correction", "none", "--expert", "action=2", "--expert", "scene=0", "--path", "clip_3"]
    rows = json.loads(run(capsys, "search", QUERY, "--index", index, "--json", *options))
    expected = VideoIndex.load(index).search(
        QUERY, correction="none", experts={"action": 2.0, "scene": 0.0}, path="clip_3"
    )
    assert [(row["path"], row["score"]) for row in rows] == [(hit.path, pytest.approx(hit.score)) for hit in expected]
    assert len(rows) == 1
    assert json.loads(run(capsys, "search", QUERY, "--index", index, "--json", "--min-seconds", "1.5"))[0]["end"] == 2


def test_a_file_of_queries_prints_one_line_per_query(index, capsys, tmp_path):
    (tmp_path / "queries.txt").write_text(f"{QUERY}\ntwo kids\n")
    lines = run(capsys, "search", "--queries", tmp_path / "queries.txt", "--index", index, "-k", "2").splitlines()
    assert [json.loads(line)["query"] for line in lines] == [QUERY, "two kids"]
    assert len(json.loads(lines[1])["hits"]) == 2


def test_search_like_a_video(index, some_videos, capsys):
    rows = json.loads(run(capsys, "search", "--like", some_videos / "clip_2.mp4", "--index", index, "--json"))
    assert rows[0]["path"].endswith("clip_2.mp4")


def test_the_grid_shows_thumbnails_or_the_cause_of_a_missing_file(videos, checkpoint, tmp_path, capsys):
    folder = tmp_path / "index"
    run(capsys, "index", videos, "--model", checkpoint, "--index", folder, "--num-workers", "0", "--no-text-tower")
    best = json.loads(run(capsys, "search", QUERY, "--index", folder, "--json"))
    (videos / best[1]["path"]).unlink()
    run(capsys, "search", QUERY, "--index", folder, "--grid", tmp_path / "grid.png")
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (5 * 224, 2 * (224 + 34))
    assert picture.getpixel((224 + 200, 200)) == (235, 235, 235)  # the second tile: grey, with the cause
    assert picture.getpixel((200, 200)) != (235, 235, 235)


@pytest.mark.parametrize("query", ["dog " * 10_000, "🐕🥏", "ein Hund fängt eine Scheibe", "!" * 20_000, "犬"])
def test_odd_queries_get_an_answer(index, capsys, query):
    assert len(json.loads(run(capsys, "search", query, "--index", index, "--json"))) == 6


def test_mistakes_are_one_line_each(index, capsys, tmp_path, some_videos, checkpoint):
    assert "the query is empty" in error_line(capsys, "search", "  ", "--index", index)
    assert "holds no index" in error_line(capsys, "search", QUERY, "--index", tmp_path)
    assert "did you mean action" in error_line(capsys, "search", QUERY, "--index", index, "--expert", "acton=2")
    assert "NAME=WEIGHT" in error_line(capsys, "search", QUERY, "--index", index, "--expert", "action")
    assert "give a text, --like FILE" in error_line(capsys, "search", "--index", index)
    assert "nothing.mp4" in error_line(capsys, "search", "--like", tmp_path / "nothing.mp4", "--index", index)
    like = ("search", "--like", some_videos / "clip_2.mp4", "--index", index)
    assert "is for texts" in error_line(capsys, *like, "--correction", "query_bank")
    assert "--model is missing" in error_line(capsys, "index", some_videos, "--index", tmp_path / "new")
    assert "does not exist" in error_line(
        capsys, "index", tmp_path / "no", "--model", checkpoint, "--index", tmp_path / "new"
    )
    assert "cannot load the model" in error_line(
        capsys, "index", some_videos, "--model", tmp_path, "--index", tmp_path / "new"
    )
    assert "--stride needs" in error_line(capsys, "index", some_videos, "--index", index, "--stride", "2")
    assert "name it .parquet" in error_line(capsys, "export", "out.xls", "--index", index)
    (tmp_path / "blank.txt").write_text("\n\n")
    assert "query bank is empty" in error_line(capsys, "calibrate", "--bank", tmp_path / "blank.txt", "--index", index)


def test_info_describes_the_index(index, capsys):
    stats = json.loads(run(capsys, "info", "--index", index, "--json"))
    assert (stats["files"], stats["moments"], stats["skipped"]) == (6, 6, 0)
    assert stats["hours"] == pytest.approx((5 * 1 + 2) / 3600)
    assert stats["query_bank"] == {"queries": 3, "tau": 0.05}
    assert sum(stats["mean_gates"].values()) == pytest.approx(1, abs=1e-5)
    assert "moments" in run(capsys, "info", "--index", index)


def test_export_writes_all_columns_to_parquet_and_no_vectors_to_csv(index, capsys, tmp_path):
    from datasets import Dataset

    run(capsys, "export", tmp_path / "all.parquet", "--index", index)
    exported = Dataset.from_parquet(str(tmp_path / "all.parquet"), cache_dir=str(tmp_path))
    assert exported["vector"][:] == VideoIndex.load(index).table()["vector"].to_pylist()
    run(capsys, "export", tmp_path / "all.csv", "--index", index)
    rows = list(csv.DictReader(open(tmp_path / "all.csv")))
    assert len(rows) == 6 and {"path", "start", "end", "bias"} <= rows[0].keys() and "vector" not in rows[0]


def test_calibrate_prints_the_size_and_temperature_of_the_bank(videos, checkpoint, tmp_path, capsys):
    run(
        capsys,
        "index",
        videos,
        "--model",
        checkpoint,
        "--index",
        tmp_path / "index",
        "--num-workers",
        "0",
        "--no-text-tower",
    )
    (tmp_path / "log.txt").write_text("a blue disc\ntwo kids\n")
    said = run(capsys, "calibrate", "--bank", tmp_path / "log.txt", "--tau", "0.2", "--index", tmp_path / "index")
    assert said == "the query bank has 2 queries, temperature 0.2\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00.0"), (83.46, "1:23.5"), (59.97, "1:00.0"), (3723, "1:02:03.0")]
)
def test_times_are_formatted_as_in_a_player(seconds, shown):
    assert format_time(seconds) == shown


def test_a_missing_package_is_named_with_the_extra_that_has_it(checkpoint, tmp_path):
    """As after `pip install camoe` without extras, in a process of its own."""
    code = f"""
import sys
sys.modules["accelerate"] = None
from camoe_search.cli import main
main(["index", {str(tmp_path)!r}, "--model", {str(checkpoint)!r}, "--index", {str(tmp_path / "index")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "accelerate is not installed: camoe_search needs `pip install 'camoe[search]'`\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}")
