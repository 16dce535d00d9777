# SPDX-License-Identifier: Apache-2.0
"""Pictures of the search page in headless Chromium: docs/images/page_*.png, at 1280 and at 390 pixels.

    python docs/screenshots.py --index my-index --query "a green star moving right among the clouds"

The empty page, results, the player and an error. With --axe FILE (axe.min.js of the npm package axe-core) each is also
checked for accessibility, and what is serious is printed.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


IMAGES = Path(__file__).parent / "images"
SIZES = {1280: 800, 390: 844}  # width: height
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, metavar="DIR")
    parser.add_argument("--query", required=True, metavar="TEXT")
    parser.add_argument("--play", metavar="TEXT", help="play the first result with this in its name")
    parser.add_argument("--axe", type=Path, metavar="FILE", help="axe.min.js")
    options = parser.parse_args()
    command = [sys.executable, "-m", "camoe_search", "serve", "--index", options.index, "--port", "0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = serving.stdout.readline().split()[4]
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
            for width, height in SIZES.items():
                # The program evaluates scripts in the page, which its own policy forbids.
                page = browser.new_page(viewport={"width": width, "height": height}, bypass_csp=True)
                page.goto(address)
                show(page, width, options)
            browser.close()
    finally:
        serving.terminate()
        serving.wait()


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
