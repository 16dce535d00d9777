# SPDX-License-Identifier: Apache-2.0
"""The page of `camoe serve` in headless Chromium: from Enter to the first results on the screen.

    python benchmarks/page_speed.py --count 100000

The index holds random vectors without video files, and the model is a stand-in that turns a text into a random vector
at once: this measures page, server and search, not a text tower. Browser and server share the machine.
"""

import argparse
import shutil
import time

import numpy as np
from playwright.sync_api import Page, sync_playwright
from served_index import served_index


GOAL = 300  # milliseconds
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# From the key to the frame that shows the first card, by the page's own clock.
WATCH = """() => {
    const hits = document.querySelector("#hits");
    let begin;
    window.took = undefined;
    hits.replaceChildren();
    document.querySelector("#text").addEventListener("keydown", () => { begin = performance.now(); }, { once: true });
    new MutationObserver((changes, observer) => {
        if (!hits.querySelector(".card")) return;
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => { window.took = performance.now() - begin; }));
    }).observe(hits, { childList: true });
}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="moments")
    parser.add_argument("--width", type=int, default=2048, help="entries of a folded vector")
    parser.add_argument("--queries", type=int, default=20, help="searches, one after the other")
    options = parser.parse_args()
    with served_index(options.count, options.width) as (_, port), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(bypass_csp=True)
        begin = time.perf_counter()
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_selector("#recent .card")
        opened = 1000 * (time.perf_counter() - begin)
        milliseconds = [milliseconds_of(page, f"query {number}") for number in range(options.queries + 1)][1:]
        browser.close()
    median, slowest = np.median(milliseconds), max(milliseconds)
    print(f"{options.count} moments of {options.width} entries")
    print(f"the page is open with the newest files and the folders after {opened:.0f} ms")
    print(f"from Enter to the first results: median {median:.0f} ms, slowest of {options.queries} {slowest:.0f} ms")
    print(f"goal of {GOAL} ms: {'met' if median <= GOAL else 'not met'} (median)")


def milliseconds_of(page: Page, text: str) -> float:
    """One search with the keyboard."""
    page.fill("#text", text)
    page.focus("#text")
    page.evaluate(WATCH)
    page.keyboard.press("Enter")
    page.wait_for_function("window.took !== undefined", polling=10)
    return page.evaluate("window.took")


if __name__ == "__main__":
    main()
