# SPDX-License-Identifier: Apache-2.0
"""`camoe serve` in a real browser: search, play, switch the correction, find similar moments, turn pages."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from camoe_search import serve
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
    return VideoIndex.create_or_update(
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


@contextlib.contextmanager
def served(index, **options):
    """The address of a server in this process."""
    listener = serve.listen("127.0.0.1", 0)
    app = serve.make_app({"index": index}, page_size=3, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(page, text: str):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#hits .card")


def expect_hits(page, hits):
    """Names and times, in order: several moments are of one file."""
    expect(page.locator("#hits .card")).to_have_count(len(hits))
    keys = page.locator("#hits .card").evaluate_all("cards => cards.map(card => card.dataset.key)")
    assert keys == [hit.key for hit in hits]


def search_with(page, action):
    """Do something that searches; returns when the answer is shown."""
    with page.expect_response("**/api/search"):
        action()
    expect(page.locator("#hits.waiting")).to_have_count(0)


def focused(page) -> str:
    """What has the focus: id or class."""
    return page.evaluate("(node => node.id || node.className || node.tagName)(document.activeElement)")


def wait_until(page, condition: str):
    """`wait_for_function` evaluates a string in the page, which its security policy forbids."""
    end = time.monotonic() + TIMEOUT / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def test_search_correction_paging_and_similar_moments(page, index):
    ask(page, QUERY)  # before the page has loaded /api/about
    expect(page.locator("#about")).to_contain_text("8 moments, indexed with checkpoint")
    expect(page).to_have_title(f"{QUERY} – CAMoE search")
    expected = index.search(QUERY, k=8)
    expect_hits(page, expected[:3])
    assert page.locator("#hits .name").all_inner_texts() == [os.path.basename(hit.path) for hit in expected[:3]]
    page.wait_for_load_state("networkidle")
    picture = page.locator("#hits .open img").first
    assert picture.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [64, 48]  # all of the frame, not a square
    assert picture.evaluate("i => getComputedStyle(i).objectFit") == "contain"

    page.click("#options summary")
    search_with(page, lambda: page.check("#corrections input[value=none]"))
    uncorrected = index.search(QUERY, k=8, correction="none")
    expect_hits(page, uncorrected[:3])

    search_with(page, lambda: page.click("#next"))
    expect_hits(page, uncorrected[3:6])
    expect(page.locator("#next")).to_be_disabled()
    assert focused(page) == "open"  # the button that had it is disabled
    search_with(page, lambda: page.locator("#hits .similar").first.click())
    expect_hits(page, index.search_similar(uncorrected[3].key, 3))
    expect(page.locator("#status")).to_contain_text(f"Moments like {os.path.basename(uncorrected[3].path)}")
    search_with(page, page.go_back)
    expect_hits(page, uncorrected[3:6])


def test_relevance_is_in_words_and_the_reasons_open_on_request(page, index):
    ask(page, QUERY)
    card = page.locator("#hits .card").first
    expect(card.locator(".match")).to_have_text(re.compile("(Strong|Good|Fair|Weak) match"))
    score = f"{index.search(QUERY, k=1)[0].score:.3f}"
    assert score not in card.inner_text()
    card.locator(".why summary").click()
    assert card.locator("dt").all_inner_texts() == [*index.description.experts, "correction"]
    expect(card.locator(".plain")).to_contain_text(f"Score {score}. The expert")


def test_the_page_opens_on_the_newest_files_folders_and_examples(page, index, some_videos):
    expect(page.locator("#recent .card")).to_have_count(6)
    newest = max(some_videos.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    expect(page.locator("#recent .name").first).to_have_text(newest.name)
    folder = page.locator("#folders button").first
    expect(folder).to_contain_text(str(some_videos))
    folder.click()
    expect(page.locator("#recent_title")).to_have_text(f"Newest files in {some_videos}")
    assert page.input_value("#path") == str(some_videos) and focused(page) == "text"
    example = page.locator(".example").first
    text = example.inner_text()
    search_with(page, example.click)
    expect(page).to_have_title(f"{text} – CAMoE search")
    expect(page.locator("#start")).to_be_hidden()


def test_keys_alone_search_open_play_turn_and_close(page):
    seen = []

    def press(key: str):
        page.keyboard.press(key)
        seen.append(focused(page))

    expect(page.locator("#recent .card")).to_have_count(6)
    page.keyboard.press("/")  # the empty query has the focus already
    page.evaluate("document.activeElement.blur()")
    press("/")
    page.keyboard.type(QUERY)
    assert page.input_value("#text") == QUERY
    search_with(page, lambda: press("Enter"))
    press("ArrowDown")
    press("ArrowRight")
    press("ArrowLeft")
    press("Enter")
    expect(page.locator("#player")).to_be_visible()
    first = page.inner_text("#player_title")
    wait_until(page, "document.querySelector('#video').currentTime > 0.1")
    page.focus("#player")
    page.evaluate("document.querySelector('#copy_path').focus()")
    press("ArrowRight")
    expect(page.locator("#player_title")).not_to_have_text(first)
    press("ArrowLeft")
    expect(page.locator("#player_title")).to_have_text(first)
    press("Escape")
    expect(page.locator("#player")).to_be_hidden()
    seen.append(focused(page))
    press("ArrowUp")
    assert seen[0] == "text" and seen[2:5] == ["open"] * 3 and seen[-2:] == ["open", "text"] and "BODY" not in seen, (
        seen
    )


def test_the_player_opens_at_the_second_with_the_timeline_of_the_file(page, index):
    page.click("#options summary")
    search_with(page, lambda: (page.fill("#path", "clip_5"), page.fill("#text", QUERY), page.press("#text", "Enter")))
    hit, *_ = index.search(QUERY, k=3, path="clip_5")
    page.locator("#hits .open").first.click()
    wait_until(page, f"document.querySelector('#video').currentTime > {hit.start}")
    assert page.evaluate("document.querySelector('#video').videoWidth") == 64
    assert page.locator("#video").bounding_box()["width"] > 900
    (grouped,) = index.search(QUERY, k=3, path="clip_5", group_by="file")
    expect(page.locator("#timeline button")).to_have_count(len(grouped.moments))
    expect(page.locator("#player_paths")).to_have_text(hit.path)
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "clip_5.mp4"
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy_path")
    assert page.evaluate("window.copied") == hit.path
    page.click("#copy_link")
    link = page.evaluate("window.copied")
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator("#player_title")).to_contain_text("clip_5.mp4")


def test_what_comes_later_and_what_is_unwanted_have_fields(page, index):
    page.click("#options summary")
    page.fill("#text", QUERY)
    page.fill("#not", "people")
    search_with(page, lambda: page.press("#not", "Enter"))
    expect_hits(page, index.search(QUERY, k=3, negative="people"))
    page.fill("#then", "a cat sleeps")
    search_with(page, lambda: page.press("#then", "Enter"))
    (hit,) = expected = index.search(QUERY, k=3, negative="people", then="a cat sleeps")
    expect_hits(page, expected)
    expect(page).to_have_title(f"{QUERY}, then a cat sleeps – CAMoE search")
    page.locator("#hits .open").click()
    expect(page.locator("#timeline button")).to_have_count(2)
    expect(page).to_have_url(re.compile("%22open%22"))
    page.keyboard.press("Escape")
    expect(page).not_to_have_url(re.compile("%22open%22"))
    page.reload()
    expect(page.locator("#hits .card")).to_have_count(1)
    assert [page.input_value(name) for name in ("#text", "#then", "#not")] == [QUERY, "a cat sleeps", "people"]
    search_with(page, lambda: page.locator("#hits .similar").click())
    expect(page.locator("#status")).to_contain_text(f"Moments like {os.path.basename(hit.path)}")


@pytest.mark.parametrize("codec", ["libx265", "mpeg4"])
def test_a_file_that_the_browser_cannot_play_is_converted(page, tmp_path, codec):
    options = {"preset": "ultrafast", "x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / "sound.mp4", codec=codec, options=options, audio=2.0)
    page.route("**/media/*", lambda route: route.fulfill(body=path.read_bytes(), content_type="video/mp4"))
    ask(page, QUERY)
    page.locator("#hits .open").first.click()
    expect(page.locator("#note")).to_contain_text("This is the moment alone; download the file")
    wait_until(page, "document.querySelector('#video').videoWidth == 64")
    page.errors.clear()


def test_a_file_of_a_kind_that_browsers_do_not_know_is_played(browser, checkpoint, tmp_path):
    """MPEG-TS is converted by the server."""
    film = write_video(tmp_path / "broadcast.ts", 72, 12, start=7.0, audio=6.0)
    options = {"device": "cpu", "num_workers": 0, "window": 2, "stride": 2, "text_encoder": False}
    with served(VideoIndex.create_or_update([film], tmp_path / "index", str(checkpoint), **options)) as address:
        page = browser.new_page()
        page.goto(address)
        ask(page, QUERY)
        page.locator("#hits .open").first.click()
        expect(page.locator("#note")).to_contain_text("This is the moment alone; download the file")
        wait_until(page, "document.querySelector('#video').currentTime > 0.5")
        assert page.evaluate("document.querySelector('#video').videoWidth") == 64
        other = page.locator("#timeline button:not([aria-current])").first
        other.click()
        wait_until(page, "document.querySelector('#video').currentTime > 0.5")
        expect(page.locator("#note")).to_contain_text("This is the moment alone")
        page.close()


@pytest.mark.parametrize("rest", ["#null", "#5", "#[]", "#%7B%22text%22", "#%22a%22", "#%7B%22text%22:5%7D", "#%"])
def test_a_spoiled_link_does_no_harm(page, address, rest):
    page.goto("about:blank")
    page.goto(f"{address}/{rest}")
    expect(page.locator("#recent .card")).to_have_count(6)
    ask(page, QUERY)


def test_an_address_is_that_of_what_is_shown(page):
    """Whatever closes the player: a key, the back button, or a search for similar moments."""
    ask(page, QUERY)
    first = page.url
    search_with(page, lambda: (page.fill("#text", "a cat sleeps"), page.press("#text", "Enter")))
    page.locator("#hits .open").first.click()
    expect(page.locator("#player")).to_be_visible()
    search_with(page, page.go_back)
    expect(page.locator("#player")).to_be_hidden()
    assert (page.url, page.input_value("#text")) == (first, QUERY)
    page.locator("#hits .open").first.click()
    search_with(page, lambda: page.click("#player_similar"))
    expect(page.locator("#status")).to_contain_text("Moments like")
    assert "%22like%22" in page.url
    search_with(page, page.reload)
    expect(page.locator("#status")).to_contain_text("Moments like")


def test_the_focus_stays_on_something(page):
    """What has the focus may go away: an example, a card."""
    page.evaluate(
        """() => { window.lost = 0; setInterval(() => { lost += document.activeElement === document.body; }, 5); }"""
    )
    search_with(page, page.locator(".example").first.click)
    assert focused(page) in ("open", "text")
    page.locator("#hits .open").first.focus()
    page.go_back()
    expect(page.locator("#recent .card")).to_have_count(6)
    assert focused(page) == "text"
    page.locator("#recent .open").first.focus()
    search_with(page, page.go_forward)
    page.locator("#hits .similar").first.focus()
    search_with(page, lambda: page.keyboard.press("Enter"))
    page.get_by_role("button", name="Back to the query").focus()
    search_with(page, lambda: page.keyboard.press("Enter"))
    page.wait_for_timeout(100)
    assert page.evaluate("lost") == 0 and focused(page) != "BODY"


def test_a_picture_is_a_query(page, index, tmp_path):
    page.wait_for_selector("#recent .card")
    picture = tmp_path / "frame.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(picture)
    search_with(page, lambda: page.set_input_files("#file", picture))
    expect_hits(page, index.search_like(picture.read_bytes(), k=3))
    expect(page.locator("#status")).to_contain_text("Moments like frame.png")
    expect(page).to_have_title("Like frame.png – CAMoE search")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(page, index, event):
    page.wait_for_selector("#recent .card")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (30, 200, 30)).save(buffer, "PNG")
    give = """([event, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "green.png", {type: "image/png"}));
        const given = event === "drop" ? new DragEvent(event, {dataTransfer: data, bubbles: true})
                                       : new ClipboardEvent(event, {clipboardData: data, bubbles: true});
        document.querySelector("main").dispatchEvent(given);
    }"""
    search_with(page, lambda: page.evaluate(give, [event, list(buffer.getvalue())]))
    expect_hits(page, index.search_like(buffer.getvalue(), k=3))


def test_a_card_plays_while_the_mouse_is_on_it(page):
    ask(page, QUERY)
    card = page.locator("#hits .open").first
    card.hover()
    wait_until(page, "document.querySelector('#hits .open video')?.currentTime > 0.1")
    assert card.locator("video").evaluate("v => v.muted")
    page.mouse.move(0, 0)
    expect(card.locator("video")).to_have_count(0)


def test_a_browser_shows_the_token_once(browser, index):
    """The page asks for it, and its cookie opens pictures and files as well."""
    with served(index, token="0123456789abcdef") as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        expect(page.locator("#status")).to_have_text("That is not the token.")
        page.fill("#token", "0123456789abcdef")
        page.press("#token", "Enter")
        expect(page.locator("#recent .card")).to_have_count(6)
        expect(page.locator("#sign_in")).to_be_hidden()
        page.wait_for_load_state("networkidle")
        assert page.locator("#recent img").first.evaluate("i => i.naturalWidth") == 64
        page.close()
    browser.clear_cookies()


def test_on_a_phone_results_are_one_column_of_compact_rows(page):
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, QUERY)
    boxes = [card.bounding_box() for card in page.locator("#hits .card").all()]
    assert len({box["x"] for box in boxes}) == 1 and all(box["height"] < 200 for box in boxes), boxes
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.set_viewport_size({"width": 1280, "height": 720})


def test_everything_that_can_be_used_has_a_name(page):
    ask(page, QUERY)
    page.locator("#hits .open").first.click()
    expect(page.locator("#timeline button").first).to_be_visible()
    controls = "button, input, select, a, dialog, ol, video"
    nameless = page.locator(controls).evaluate_all("""nodes => nodes.filter(node => !(
        node.labels?.length || node.getAttribute("aria-label") || node.getAttribute("aria-labelledby")
        || node.ariaLabel || node.textContent.trim())).map(node => node.outerHTML.slice(0, 80))""")
    assert nameless == []


def test_mistakes_and_markup_are_shown_as_text(page):
    page.fill("#text", "   ")
    page.click("#form button.primary")
    expect(page.locator("#status.bad")).to_contain_text("the query is empty")
    page.errors.clear()  # the browser logs the 400
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("main img[src=x]").count() == 0 and page.locator("#hits .card").count() == 3
