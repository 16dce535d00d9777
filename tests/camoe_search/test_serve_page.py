# SPDX-License-Identifier: Apache-2.0
"""`camoe serve` in a real browser: search, play, switch the correction, find similar moments, turn pages."""

import os
import shutil
import subprocess
import sys

import pytest
from playwright.sync_api import expect, sync_playwright

from camoe_search.index import VideoIndex
from tests.video_files import write_video


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUERY = "a red star spins"
TIMEOUT = 30_000  # milliseconds; a busy machine is slow

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def index(some_videos, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "index"
    return VideoIndex.build(
        [some_videos], folder, str(checkpoint), device="cpu", num_workers=0, window=1, stride=0.5, text_encoder=False
    )


@pytest.fixture(scope="module")
def address(index):
    """Address of `camoe serve`, started from the command line."""
    command = [sys.executable, "-m", "camoe_search", "serve", "--index", str(index.folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    serving = subprocess.Popen(
        [*command, "--page-size", "3"], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    line = serving.stdout.readline()
    assert line.startswith("serving 8 moments at http://127.0.0.1:"), line
    yield line.split()[4]
    serving.terminate()
    assert serving.wait(timeout=30) in (0, -15)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=[*FLAGS, "--disable-sync"]
        )
        context.set_default_timeout(TIMEOUT)
        yield context
        context.close()


@pytest.fixture
def page(browser, address):
    """The open page. Requests to other hosts and messages on the console fail the test."""
    page, elsewhere, errors = browser.new_page(), [], []
    page.on("request", lambda request: None if request.url.startswith(address) else elsewhere.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.errors = errors
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith("data:")] == [] and errors == []


def ask(page, text: str):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector(".card")


def names(page) -> list[str]:
    return page.locator(".name").all_inner_texts()


def expect_scores(page, hits):
    expect(page.locator(".score")).to_have_text([f"{hit.score:.3f}" for hit in hits])


def test_search_correction_paging_and_similar_moments(page, index):
    ask(page, QUERY)  # before the page has loaded /api/about
    expect(page.locator("#about")).to_contain_text("8 moments, indexed with checkpoint")
    expected = index.search(QUERY, k=8)
    expect_scores(page, expected[:3])
    assert names(page) == [os.path.basename(hit.path) for hit in expected[:3]]
    page.wait_for_load_state("networkidle")
    card = page.locator(".card").first
    assert card.locator("dt").all_inner_texts() == [*index.description.experts, "hub"]
    picture = card.locator("video").evaluate("v => fetch(v.poster).then(r => r.headers.get('content-type'))")
    assert picture == "image/jpeg"

    page.click("#corrections label:has-text('off')")
    uncorrected = index.search(QUERY, k=8, correction="none")
    expect_scores(page, uncorrected[:3])

    page.click("#next")
    expect_scores(page, uncorrected[3:6])
    assert page.locator(".rank").all_inner_texts() == ["4", "5", "6"]
    page.click("#next")
    expect_scores(page, uncorrected[6:])
    expect(page.locator("#next")).to_be_disabled()
    page.click("#previous")
    expect_scores(page, uncorrected[3:6])

    page.locator(".similar").first.click()
    expect_scores(page, index.search_similar(uncorrected[3].key, 3))
    expect(page.locator("#status")).to_contain_text(f"Moments like {os.path.basename(uncorrected[3].path)}")
    page.go_back()
    expect_scores(page, uncorrected[3:6])


def test_a_clip_plays_from_its_start_to_its_end(page, index):
    """H.264 in Chromium: playback advances and stays within the moment."""
    page.click("#filters summary")
    page.fill("#path", "clip_5")
    ask(page, QUERY)
    hits = index.search(QUERY, k=3, path="clip_5")
    expect_scores(page, hits)
    late = next(i for i, hit in enumerate(hits) if hit.start == 1.0)
    card = page.locator(".card").nth(late)
    seen = """v => new Promise(done => {
        const times = [];
        v.addEventListener("timeupdate", () => times.push(v.currentTime));
        v.addEventListener("pause", () => done({times, error: v.error && v.error.message, width: v.videoWidth}));
        v.addEventListener("error", () => done({times, error: v.error.message}));
        setTimeout(() => done({times, error: "it did not reach its end"}), 20000);
    })"""
    page.evaluate(f"void (window.seen = ({seen})(document.querySelectorAll('video')[{late}]))")
    card.locator(".play").click()
    played = page.evaluate("window.seen")
    assert played["error"] is None and played["width"] == 64
    assert min(played["times"]) >= 0.99 and 1.5 < max(played["times"]) <= 2.1 and len(set(played["times"])) > 2


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ("libx265", "cannot play the picture of the file, only its sound"),
        ("mpeg4", "cannot play the picture of the file"),
    ],
)
def test_a_file_of_which_the_browser_plays_the_sound_alone_says_so_and_stays_silent(page, tmp_path, codec, said):
    options = {"preset": "ultrafast", "x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / "sound.mp4", codec=codec, options=options, audio=2.0)
    page.route("**/media/*", lambda route: route.fulfill(body=path.read_bytes(), content_type="video/mp4"))
    ask(page, QUERY)
    card = page.locator(".card").first
    card.locator(".play").click()
    expect(card.locator(".note")).to_contain_text(said)
    expect(card.locator(".note")).to_contain_text(card.locator(".name").inner_text())
    assert card.locator("video").evaluate("v => [v.videoWidth, v.paused]") == [0, True]


def test_mistakes_and_markup_are_shown_as_text(page):
    page.fill("#text", "   ")
    page.click("button.primary")
    expect(page.locator("#status.bad")).to_contain_text("the query is empty")
    page.errors.clear()  # the browser logs the 400
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("main img").count() == 0 and page.locator(".card").count() == 3
