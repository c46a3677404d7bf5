"""The report in a real browser: no complaint on the console, all arms in sight, no sideways scrolling on a phone."""

import re
import subprocess

import numpy as np
import pytest
from chromium import CHROMIUM
from emoloop.evals.report import write_report
from eval_rows import document_of, outcome_of
from PIL import Image

ARMS = {
    "base": (2.4, 0.9, 0.9, 0.1),
    "rewrite": (1.2, 0.9, 0.4, 0.5),
    "best_of_n": (2.0, 0.9, 0.9, 0.3),
    "rewrite_best_of_n": (1.0, 0.9, 0.4, 0.7),
    "loop": (0.5, 0.9, 0.4, 0.9),
    "opd": (2.6, 0.9, 0.4, 1.2),
}

#: Writes what only a browser knows into the page, where `--dump-dom` shows it.
PROBE = """<script>
const root = document.documentElement, broken = [...document.images].filter(i => !i.naturalWidth);
root.dataset.sideways = root.scrollWidth - window.innerWidth;
root.dataset.broken = broken.length;
root.dataset.images = document.images.length;
root.dataset.arms = [...document.querySelectorAll("#arms-table tbody th")]
  .filter(cell => cell.getBoundingClientRect().height > 0).map(cell => cell.textContent).join(" ");
</script></body>"""


def chromium(folder, *arguments):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("report")
    outcome = outcome_of(folder / "home", ARMS)
    write_report(document_of(outcome, trained=["opd"]), outcome, folder)
    html = (folder / "report.html").read_text()
    assert html.count("</body>") == 1
    (folder / "probed.html").write_text(html.replace("</body>", PROBE))
    return folder


@pytest.mark.parametrize("width", [390, 1280])
def test_all_arms_are_shown_and_nothing_sticks_out(page, width):
    dom = chromium(page, f"--window-size={width},900", "--dump-dom", (page / "probed.html").as_uri())
    found = dict(re.findall(r'data-(sideways|broken|images|arms)="([^"]*)"', dom[: dom.index("<head")]))
    assert found["arms"].split() == list(ARMS)
    assert int(found["images"]) > 0 and found["broken"] == "0"
    assert int(found["sideways"]) <= 0


def test_a_screenshot_shows_table_drawings_and_the_red_flag(page):
    shot = page / "shot.png"
    chromium(page, "--window-size=1280,1600", f"--screenshot={shot}", (page / "report.html").as_uri())
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (1600, 1280, 3)
    ink = (pixels.sum(2) < 300).mean()
    assert 0.005 < ink < 0.3, "a page of text is mostly paper"
    red, green, blue = np.moveaxis(pixels, 2, 0)
    assert ((red > 150) & (green < 80) & (blue < 80)).sum() > 200, "the flagged arm is in red"
    assert ((blue > 150) & (red < 80)).sum() > 200, "intervals are drawn in blue"


def test_it_prints(page):
    paper = page / "report.pdf"
    chromium(page, "--no-pdf-header-footer", f"--print-to-pdf={paper}", (page / "report.html").as_uri())
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 10_000
