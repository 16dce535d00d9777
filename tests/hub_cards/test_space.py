# SPDX-License-Identifier: Apache-2.0
"""The Space: what it computes, and its page in a browser, run from the Hub in an environment without this project."""

import itertools
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import clip_search
import numpy as np
import pytest
import torch
from clip_search import Retrieval, cut
from draw import draw_gallery, draw_ranking
from fake_hub import FakeHub
from huggingface_hub import SpaceCard, constants
from release import assemble, find_card, upload
from release_space import main
from run_elsewhere import environment
from untrusted import RequestError

from camoe_search.files import cut_windows
from modeling_camoe import CAMoEModel, CAMoEPipeline, CAMoEProcessor
from modeling_camoe.frames import Clip
from tests.video_files import write_video


CHROMIUM = Path("/usr/bin/chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync".split()
MODEL, SPACE = "org/camoe-motion", "org/camoe-demo"
QUERY = "a red star spins <b>fast</b> on the beach"


@pytest.fixture(scope="module")
def release(run_dir, clip, tmp_path_factory):
    """A release folder with an example clip."""
    place = tmp_path_factory.mktemp("release")
    assemble(run_dir, place, find_card(None, MODEL), MODEL, [clip])
    return place


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three videos that look different."""
    folder = tmp_path_factory.mktemp("clips")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    light = {"noon": 1, "dusk": 3, "night": 9}
    return [write_video(folder / f"{name}.mp4", 8, pictures=pictures // part) for name, part in light.items()]


@pytest.fixture(scope="module")
def expected(run_dir, clips):
    """Name of a clip -> its score, best first, by the pipeline."""
    model, processor = CAMoEModel.from_pretrained(run_dir).eval(), CAMoEProcessor.from_pretrained(run_dir)
    pipe = CAMoEPipeline(model, processor=processor, device="cpu")
    return {clips[found["video"]].name: found["score"] for found in pipe(texts=QUERY, videos=clips)}


@pytest.fixture(scope="module")
def retrieval(release):
    return Retrieval(str(release))


def ranked(retrieval, query, paths, is_corrected=False):
    moments = [moment for path in paths for moment in retrieval.moments(str(path))]
    return retrieval.rank(retrieval.encode_query(query)[1], moments, is_corrected)


def test_the_parts_add_up_to_the_score_of_the_pipeline(retrieval, clips, expected):
    texts, _ = retrieval.encode_query(QUERY)
    assert list(texts) == ["fusion", "entity", "action", "scene"]
    assert texts["fusion"] == QUERY and texts["entity"].startswith("red star")
    hits = ranked(retrieval, QUERY, clips)
    assert [hit.moment.clip for hit in hits] == list(expected)
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.moment.clip], abs=1e-5)
        assert hit.score == pytest.approx(hit.parts.sum().item(), abs=1e-6)
        assert (hit.moment.gate * hit.matches).tolist() == pytest.approx(hit.parts.tolist(), abs=1e-6)
        assert hit.moment.gate.sum().item() == pytest.approx(1, abs=1e-5)
        assert len(hit.moment.strip) == 3 and hit.moment.frame_weights.shape == (4, 3)


def test_the_bias_follows_the_formula_of_the_card(retrieval, release, clips):
    captions = (release / "query_bank.txt").read_text().splitlines()
    tau = json.loads((release / "eval_results.json").read_text())["settings"]["tau"]
    scores = torch.tensor([ranked(retrieval, caption, clips[:1])[0].score for caption in captions])
    bias = tau * (torch.logsumexp(scores / tau, dim=0).item() - math.log(len(captions)))
    plain, corrected = (ranked(retrieval, captions[0], clips[:1], flag)[0] for flag in (False, True))
    assert corrected.bias == pytest.approx(bias, abs=1e-5) and plain.bias is None
    assert plain.score - corrected.score == pytest.approx(bias, abs=1e-5)


def test_a_long_clip_is_cut_into_moments_as_by_search(retrieval, tmp_path):
    for seconds in (3.0, 30.0, 30.5, 35.0, 64.2, 600.0):
        assert np.array(cut(seconds)) == pytest.approx(np.array(cut_windows(seconds)))
    pictures = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "long.mp4", 88, 2, gop=4, pictures=[pictures[i // 20] for i in range(88)])
    moments = retrieval.moments(str(path))
    assert [(moment.start, moment.end) for moment in moments] == cut_windows(44.0)
    hits = retrieval.rank(retrieval.encode_query(QUERY)[1], moments)
    spans = sorted((hit.moment.start, hit.moment.end) for hit in hits)
    assert len(spans) > 1 and all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    whole = Clip(str(path), hits[0].moment.start, hits[0].moment.end)
    pipe = CAMoEPipeline(retrieval.model, processor=retrieval.processor, device="cpu")
    assert hits[0].score == pytest.approx(pipe(texts=QUERY, videos=[whole])[0]["score"], abs=1e-5)


def test_a_release_without_bank_and_examples_works_without_them(release, clips, tmp_path):
    for path in release.iterdir():
        if path.name not in ("query_bank.txt", "examples.json"):
            (tmp_path / path.name).symlink_to(path)
    retrieval = Retrieval(str(tmp_path))
    assert retrieval.captions == [] and retrieval.examples == {}
    assert len(ranked(retrieval, QUERY, clips)) == 3


def test_a_gpu_that_is_lent_is_asked_for_where_the_model_runs(release, clips, monkeypatch):
    asked = []

    def lend(function):
        return lambda *arguments: asked.append(function.__name__) or function(*arguments)

    monkeypatch.setattr(clip_search, "spaces", SimpleNamespace(GPU=lend))
    retrieval = Retrieval(str(release))
    assert len(ranked(retrieval, QUERY, clips[:1], True)) == 1
    assert asked == ["_run_on_videos", "_run_on_texts", "_run_on_texts"]  # the clip, the query, the bank


@pytest.mark.parametrize(("content", "message"), [(b"hello" * 100, "is not a video"), (b"", "is not a video")])
def test_the_error_names_a_file_that_is_not_a_video(retrieval, tmp_path, content, message):
    (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(RequestError, match=f"broken.mp4 {message}"):
        retrieval.moments(str(tmp_path / "broken.mp4"))


def test_a_large_file_is_refused_without_reading_it(retrieval, tmp_path):
    with open(tmp_path / "large.mp4", "wb") as file:
        file.truncate(2**31)  # sparse: nothing is stored on disk
    with pytest.raises(RequestError, match="large.mp4 is larger than 64 MiB"):
        retrieval.moments(str(tmp_path / "large.mp4"))


def test_visitors_text_is_escaped(retrieval, clips):
    evil = "<script>alert(1)</script>"
    moments = retrieval.moments(str(clips[0]), name=evil)
    texts, embeds = retrieval.encode_query(f"a dog {evil}")
    page = draw_gallery([moments], [evil]) + draw_ranking(texts, retrieval.rank(embeds, moments, True))
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4


@pytest.fixture
def hub(release, tmp_path, monkeypatch):
    """A Hub with the release."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        upload(release, MODEL, private=False, create_pr=False)
        yield hub


def publish(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["release_space.py", *arguments])
    main()


def test_a_space_names_its_model_and_is_one_commit(hub, monkeypatch):
    publish(monkeypatch, "--model", MODEL, "--repo_id", SPACE, "--private")
    repository = hub.repositories[f"spaces/{SPACE}"]
    files = hub.files(f"spaces/{SPACE}")
    assert repository.private and len(repository.commits) == 2
    assert set(files) >= {
        "README.md",
        "app.py",
        "clip_search.py",
        "draw.py",
        "hubs.py",
        "look.css",
        "ranking.html",
        "untrusted.py",
        "requirements.txt",
    }
    data = SpaceCard(files["README.md"].decode()).data
    assert (data.models, data.sdk, data.app_file) == ([MODEL], "gradio", "app.py")
    assert b"handler" not in files["app.py"]
    assert files["untrusted.py"].startswith(b"# SPDX-License-Identifier")  # the file, not a link


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "org/none", "--repo_id", SPACE], "--model: org/none cannot be read"),
        (["--model", "a/b/c", "--repo_id", SPACE], "--model"),
        (["--model", MODEL, "--repo_id", SPACE, "--dry_run", "."], "exists already"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(hub, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        publish(monkeypatch, *arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1]
    assert f"spaces/{SPACE}" not in hub.repositories


@pytest.fixture
def address(hub, fresh_python, tmp_path, monkeypatch):
    """The Space, running as the Hub would run it: its files in a folder, the model from the Hub by its id."""
    publish(monkeypatch, "--model", MODEL, "--repo_id", SPACE)
    folder = tmp_path / "space"
    folder.mkdir()
    for name, content in hub.files(f"spaces/{SPACE}").items():
        (folder / name).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    log = open(tmp_path / "log", "wb")
    server = subprocess.Popen(
        [str(fresh_python), "app.py"], cwd=folder, env=environment(tmp_path, hub) | settings, stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + 240
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
        log.close()


def _answers(port: int) -> bool:
    try:
        return urlopen(f"http://127.0.0.1:{port}/", timeout=5).status == 200
    except (URLError, OSError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium")
def test_a_visitor_uploads_clips_and_sees_the_ranking(address, retrieval, clips, expected, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    expect = playwright.expect
    expect.set_options(timeout=60_000)  # milliseconds; a busy machine is slow
    (tmp_path / "broken.mp4").write_bytes(b"hello" * 100)
    elsewhere = []

    def guard(route):
        is_here = route.request.url.startswith((address, "data:", "blob:"))
        elsewhere.append(route.request.url) if not is_here else None
        route.continue_() if is_here else route.abort()

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=str(CHROMIUM), headless=True, args=FLAGS
        )
        browser.route("**/*", guard)
        browser.set_default_timeout(60_000)
        page = browser.new_page()
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(address)
        example = page.locator("#examples button").first
        assert "✓ example_1.mp4" in example.inner_text()  # chosen at the beginning
        box, results = (page.locator(name).bounding_box()["y"] for name in ("#query", "#ranking"))
        assert box < results < page.locator("input[type=file]").locator("..").bounding_box()["y"]  # on a phone
        page.set_viewport_size({"width": 1280, "height": 800})
        example.click()  # taken out
        expect(example).not_to_contain_text("✓")
        page.set_input_files("input[type=file]", [*map(str, clips), str(tmp_path / "broken.mp4")])
        page.locator(".tile").nth(2).wait_for()
        assert page.locator(".tile").count() == 3
        assert "broken.mp4 is not a video" in page.locator(".problem").inner_text()

        page.locator("#query").get_by_role("textbox").fill(QUERY)
        page.get_by_role("button", name="Search").click()
        page.locator(".hit").nth(2).wait_for()
        assert page.locator(".hit .name").all_inner_texts() == list(expected)
        scores = [float(text) for text in page.locator(".hit .score").all_inner_texts()]
        assert scores == pytest.approx(list(expected.values()), abs=6e-4)
        legend = page.locator(".legend li").all_inner_texts()
        texts, _ = retrieval.encode_query(QUERY)
        assert legend == [f"{expert} reads “{text}”" for expert, text in texts.items()]
        best = page.locator(".hit[open]")
        assert best.count() == 1 and best.locator(".strip img").count() == 3
        parts = [float(text[1:]) for text in best.locator("tbody td:nth-child(4)").all_inner_texts()]
        assert sum(parts[:4]) == pytest.approx(parts[4], abs=3e-3) and parts[4] == scores[0]
        video = page.request.get(f"{address}/{best.locator('video').get_attribute('src').split('#')[0]}")
        assert video.status == 200 and video.body() in [path.read_bytes() for path in clips]

        page.get_by_label("query bank").check()  # now minus the bias, which the table shows
        best.locator("tr.sum", has_text="bias").wait_for()
        hits = ranked(retrieval, QUERY, clips, True)
        assert page.locator(".hit .name").all_inner_texts() == [hit.moment.clip for hit in hits]

        example.click()  # in again: a clip that came with the release
        page.locator(".hit").nth(3).wait_for()
        assert page.locator(".tile").count() == 4

        assert not best.locator(".note").is_visible()
        # Chromium plays the sound of MPEG-4 and not its picture.
        sound = write_video(tmp_path / "sound.mp4", codec="mpeg4", audio=2.0).read_bytes()
        page.route("**/gradio_api/file=**", lambda route: route.fulfill(body=sound, content_type="video/mp4"))
        best.locator("video").evaluate("v => { v.load(); v.play(); }")
        best.locator(".note").wait_for(state="visible")
        browser.close()
    assert elsewhere == []
