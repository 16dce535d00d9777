# SPDX-License-Identifier: Apache-2.0
"""README and docs are true: the site builds, files and options that pages name exist, and Python blocks run.

A block marked `python` is run by a test; one marked `py` needs the network, a server or a library that tests lack.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("modeling_camoe", "training", "camoe_search", "hub_cards", "benchmarks", "docs", "tests")
PATH = re.compile(rf"(?<![\w/.-])(?<!--page )((?:{'|'.join(ROOMS)})/[\w./-]*\w)(?![\w*-])")

# Options of programs that are not ours.
OTHERS = {"--json", "--data-binary", "--array", "--mixed_precision", "--num_processes", "--config_file", "--cpu"}
OTHERS |= {"--path-column", "--start-column", "--end-column"}  # ours, put together in a loop
OTHERS |= {"--num_machines", "--num_cpu_threads_per_process", "--dynamo_backend", "--help", "--editable"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def source() -> str:
    files = [path for room in ROOMS for suffix in ("py", "sh") for path in (ROOT / room).rglob(f"*.{suffix}")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_the_site_builds_and_no_link_in_it_is_broken(tmp_path):
    pytest.importorskip("mkdocs")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    assert "CAMoEModel" in (tmp_path / "site" / "api" / "index.html").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    assert not [path for path in PATH.findall(text) if not (ROOT / path).exists() and not path.endswith(".json")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page):
    code = source().replace('"--thumbnails"', '"--thumbnails", "--no-thumbnails"')  # argparse adds the other one
    options = set(re.findall(r"(?<![\w-])(--[a-z][\w.-]*[a-z0-9])", page.read_text(encoding="utf-8"))) - OTHERS
    unknown = [
        o for o in options if f'"{o}"' not in code and not re.search(rf"\b{o[2:].split('.')[-1]}\b\s*[:=]", code)
    ]
    assert not unknown


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with what the pages name: a checkpoint, clips, an index of them."""
    for part in tiny_model_and_processor():
        part.save_pretrained(tmp_path / "runs" / "demo")
    for name in ("clip.mp4", "other.mp4", "a.mp4", "b.mp4", "data/motion_demo/test/test_00000.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / name, num_frames=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(page: str, **names) -> dict:
    """All blocks of a page in one namespace; a release on the Hub is the local checkpoint."""
    for block in blocks(ROOT / page, "python"):
        block = block.replace('"org/camoe-motion"', '"runs/demo"').replace(', revision="<commit>"', "")
        exec(compile(block, page, "exec"), names)
    return names


def test_every_python_block_is_on_a_page_that_a_test_runs():
    run = {"README.md", "model.md", "using-it-from.md", "search.md", "serve.md", "publish.md", "evaluation.md"}
    assert {page.name for page in PAGES if blocks(page, "python")} == run


def test_the_lines_of_the_readme_run(workplace):
    names = run_blocks("README.md")
    assert names["videos"].shape == names["texts"].shape
    assert -1 <= float(names["processor"].score(names["texts"], names["videos"])) <= 1


def test_the_lines_for_other_libraries_give_the_same_vectors(workplace, monkeypatch):
    from camoe_search.index import VideoIndex
    from modeling_camoe import export_onnx

    exported = []
    monkeypatch.setattr(export_onnx, "export_onnx", lambda *arguments: exported.append(arguments))
    options = {"num_workers": 0, "text_encoder": False}
    VideoIndex.create_or_update([workplace / "a.mp4", workplace / "b.mp4"], "my-index", "runs/demo", **options)
    names = run_blocks("docs/using-it-from.md")
    assert sorted(names["ranking"].tolist()) == [0, 1]
    assert abs(names["documents"] - names["videos"].numpy()).max() < 1e-5
    assert names["batch"]["pixel_values_videos"].shape[0] == 2 and len(names["table"]) == 2
    assert names["rows"][0]["path"] == "clip.mp4" and len(names["rows"][0]["vector"]) == names["videos"].shape[1]
    assert exported[0][2] == "onnx"


def test_the_lines_of_search_run(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    for name in ("videos/2024/beach.mp4", "videos/old/a.mp4", "more/b.mp4"):
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(workplace / name, num_frames=8 + len(name))
    write_video(workplace / "film.mp4", 40 * 4, fps=4)
    shutil.copy(workplace / "film.mp4", workplace / "videos" / "film.mp4")
    (workplace / "videos" / "metadata.jsonl").write_text('{"file_name": "2024/beach.mp4", "year": 2024}\n')
    (workplace / "videos" / "2024" / "beach.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nbudget meeting\n")
    (workplace / "runs" / "demo" / "query_bank.txt").write_text("a dog\na cat\ntwo kids on a beach\n")
    width = tiny_model_and_processor()[0].config.projection_dim * 4
    vectors = np.eye(width, dtype=np.float32)[:2]
    names = run_blocks("docs/search.md", vectors=vectors, vector=vectors[0], queries=["a dog", "a red star"])
    paths = set(names["index"].table()["path"].to_pylist())
    assert paths == {str(workplace / name) for name in ("videos/2024/beach.mp4", "videos/film.mp4", "more/b.mp4")}
    assert names["scores"].shape == (1, 2)


def test_the_lines_for_a_release_run(workplace):
    run_blocks("docs/publish.md")
    names = run_blocks("docs/serve.md", dataset={"video": ["a.mp4", "b.mp4"]})
    assert len(names["vectors"]) == 2 and {found["label"] for found in names["found"]} == {
        "a dog runs",
        "a cat sleeps",
    }


def test_a_matrix_is_saved_as_the_page_says(workplace):
    run_blocks("docs/evaluation.md", similarity=np.eye(3, dtype=np.float32))
    assert np.load("theirs.npy").shape == (3, 3)
