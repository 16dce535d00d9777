# SPDX-License-Identifier: Apache-2.0
"""Pictures of the search page and of the Space in headless Chromium: docs/images, at 1280 and at 390 pixels.

    python docs/screenshots.py --index my-index --query "a green star moving right among the clouds"
    python docs/screenshots.py --space release --query "a violet cross spins in the desert" --upload film.mp4

page_*.png: the empty page, results, the player and an error; with --axe FILE (axe.min.js of the npm package axe-core)
each is also checked for accessibility, and what is serious is printed. space*.png: what the Space finds in the
examples of a release folder and in files that are uploaded.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


IMAGES = Path(__file__).parent / "images"
SPACE = Path(__file__).parents[1] / "hub_cards" / "space"
SIZES = {1280: 800, 390: 844}  # width: height
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 300  # seconds until a server is there


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--index", metavar="DIR", help="of the search page")
    what.add_argument("--space", metavar="DIR", help="a release, as hub_cards/release.py makes it")
    parser.add_argument("--query", required=True, metavar="TEXT")
    parser.add_argument("--play", metavar="TEXT", help="play the first result with this in its name")
    parser.add_argument("--axe", type=Path, metavar="FILE", help="axe.min.js")
    parser.add_argument("--upload", nargs="*", default=[], metavar="FILE", help="to the Space")
    options = parser.parse_args()
    serving, address = serve_index(options.index) if options.space is None else serve_space(options.space)
    try:
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
            for width, height in SIZES.items():
                # The program evaluates scripts in the page, which its own policy forbids.
                page = browser.new_page(viewport={"width": width, "height": height}, bypass_csp=True)
                page.set_default_timeout(1000 * PATIENCE)
                page.goto(address)
                (show if options.space is None else show_space)(page, width, options)
            browser.close()
    finally:
        serving.terminate()
        serving.wait()


def serve_index(folder: str) -> tuple[subprocess.Popen, str]:
    """`camoe serve`, and its address."""
    command = [sys.executable, "-m", "camoe_search", "serve", "--index", folder, "--port", "0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return serving, serving.stdout.readline().split()[4]


def serve_space(release: str) -> tuple[subprocess.Popen, str]:
    """The Space, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    environment = os.environ | settings | {"CAMOE_MODEL": os.path.abspath(release)}
    serving = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment)
    for _ in range(PATIENCE):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return serving, f"http://127.0.0.1:{port}"
        time.sleep(1)
    serving.terminate()
    raise SystemExit("the Space does not start")


def show_space(page: Page, width: int, options):
    """The ranking of uploads and examples."""
    page.locator("#examples img").first.wait_for()
    page.evaluate("document.querySelector('#head code').textContent = 'org/camoe-motion'")  # as on the Hub
    if options.upload:
        page.set_input_files("input[type=file]", options.upload)
        page.locator(".tile").nth(len(options.upload)).wait_for()
    page.locator("#query").get_by_role("textbox").fill(options.query)
    page.get_by_role("button", name="Search").click()
    page.locator(".hit").first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=IMAGES / ("space.png" if width > 1000 else f"space_{width}.png"))


def show(page: Page, width: int, options):
    """The four states, one after the other."""

    def take(name: str):
        page.wait_for_load_state("networkidle")
        page.screenshot(path=IMAGES / f"page_{name}_{width}.png")
        if options.axe is not None:
            check(page, f"{name} at {width} pixels", options.axe)

    page.wait_for_selector("#recent .card img")
    take("start")
    page.fill("#text", options.query)
    page.press("#text", "Enter")
    page.wait_for_selector("#hits .card")
    page.locator("#hits .why summary").first.click()
    take("results")
    page.locator("#hits .card").filter(has_text=options.play).locator(".open").first.click()
    page.wait_for_function("document.querySelector('#video').currentTime > 0.5")
    painted = "new Promise(painted => document.querySelector('#video').requestVideoFrameCallback(() => painted()))"
    page.evaluate(painted)
    page.evaluate("document.querySelector('#video').pause()")
    take("player")
    page.press("#close", "Enter")
    page.fill("#text", " ")
    page.press("#text", "Enter")
    page.wait_for_selector("#status.bad")
    take("error")


def check(page: Page, what: str, axe: Path):
    """Print how many rules hold, and each that is broken with the first node that breaks it."""
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    print(f"{what}: {len(found['passes'])} rules hold, {len(found['violations'])} do not")
    for broken in found["violations"]:
        print(f"  {broken['impact']}: {broken['id']}, {broken['help']}: {broken['nodes'][0]['html'][:160]}")


if __name__ == "__main__":
    main()
