"""What a browser shows of pages; runs in the environment that has Playwright.

`look.py BROWSER` reads `[[url, [text to wait for, …]], …]` from stdin, and prints for each page the sources and natural
widths of its pictures, and what it complained of.
"""

import json
import sys

from playwright.sync_api import sync_playwright

seen = []
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
    for url, texts in json.load(sys.stdin):
        page = browser.new_page(viewport={"width": 1700, "height": 1400})
        errors: list[str] = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.goto(url)
        for text in texts:
            page.get_by_text(text).first.wait_for(timeout=120_000)
        pictures = page.eval_on_selector_all(
            "img", "all => Promise.all(all.map(async it => (await it.decode(), [it.src, it.naturalWidth])))"
        )
        seen.append({"pictures": pictures, "errors": errors})
        page.close()
    browser.close()
print(json.dumps(seen))
