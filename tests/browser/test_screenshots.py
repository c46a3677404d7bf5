"""Takes the pictures of the pages for the documentation again, when it is asked to.

`SCREENSHOTS_HOME=HOME pytest -m browser tests/browser/test_screenshots.py`: with the embedded models, in a home that
is filled first where it is empty (some minutes).
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from chromium import CHROMIUM
from emoloop.service.work import Service
from emoloop.settings import load_settings
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from service_parts import API, serving

HOME = os.environ.get("SCREENSHOTS_HOME", "")
IMAGES = Path(__file__).parents[2] / "docs" / "images"

#: All pictures in sight are there; a page that watches the log is never idle.
SHOWN = """() => [...document.images].filter(it => it.getBoundingClientRect().top < innerHeight)
    .every(it => it.complete && it.naturalWidth)"""

REQUESTS = [
    {"prompt": "a rose", "target": {"category": "awe"}, "seed": 5},
    {"prompt": "a boat on the sea", "target": {"valence": 1, "arousal": -2}, "seed": 4},
    {"prompt": "a cat in a forest", "target": {"valence": 2.5, "arousal": 2}, "seed": 2},
    {"prompt": "a house on a hill", "target": {"category": "fear"}, "seed": 3},
    {"prompt": "a dog", "target": {"valence": -2, "arousal": -1}, "seed": 1},
    {"prompt": "a dog by the sea", "target": {"valence": 2, "arousal": -1}, "seed": 7},
]


def fill(client: httpx.Client) -> None:
    """Runs, one after the other, what people say of them, and a distillation of them."""
    for wanted in REQUESTS:
        run_id = client.post(f"{API}/runs", json={**wanted, "rounds": 3, "images": 8}).json()["run_id"]
        client.get(f"{API}/runs/{run_id}/watch")
        best = client.get(f"{API}/runs/{run_id}").json()["run"]["best_sha256"]
    said = {"sha256": best, "rating": 5, "favourite": True, "labels": ["keep"]}
    client.post(f"{API}/runs/{run_id}/feedback", json=said)
    client.post(f"{API}/runs/{run_id}/feedback", json={"labels": ["for the talk"]})
    wanted = {"kind": "distill", "objective": "sft", "steps": 60, "sheet_every": 20}
    job = client.post(f"{API}/jobs", json=wanted).json()["id"]
    client.get(f"{API}/jobs/{job}/log")


@pytest.mark.skipif(not HOME, reason="SCREENSHOTS_HOME names no home")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_pages_are_taken_for_the_documentation():
    service = Service(load_settings({"home": Path(HOME), "service": {"jobs": 1}}))
    with serving(service) as url, httpx.Client(base_url=url, timeout=None, trust_env=False) as client:
        if not client.get(f"{API}/runs").json()["total"]:
            fill(client)
        named = {
            it["prompt"]: it["run_id"]
            for it in client.get(f"{API}/runs", params={"q": "dog"}).json()["items"]
        }
        [job, *_] = client.get(f"{API}/jobs").json()
        dog, other = named["a dog by the sea"], named["a dog"]
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            page.set_default_timeout(300_000)

            def take(name: str, path: str = "") -> None:
                if path:
                    page.goto(url + path)
                page.wait_for_function(SHOWN)
                with Image.open(io.BytesIO(page.screenshot())) as image:
                    image.convert("RGB").save(IMAGES / f"{name}.webp", quality=85, method=6)
                assert (IMAGES / f"{name}.webp").stat().st_size <= 300_000

            take("run", f"/runs/{dog}")
            page.locator(".tile.best a.shot").click()
            page.get_by_role("button", name="Make again").click()
            expect(page.locator(".again")).to_be_visible(timeout=300_000)
            take("picture")
            take("compare", f"/compare?run={dog}&run={other}")
            take("job", f"/jobs/{job['id']}")
            page.goto(f"{url}/playground")
            page.get_by_role("button", name="Paint").click()
            expect(page.locator(".answers")).to_be_visible(timeout=300_000)
            take("playground")
            page.goto(url)
            page.locator("#new summary").click()
            take("runs")
            browser.close()
