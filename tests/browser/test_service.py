"""The pages in a real browser, as a user: start, watch, read, rate, compare, review. No complaint on the console."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from axe_playwright_python.sync_playwright import Axe
from chromium import CHROMIUM
from emoloop.domain import Critique, EmotionTarget, UserError
from emoloop.events import (
    Critiqued,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from emoloop.service.bundle import write_bundle
from emoloop.traces.store import open_store
from painter import Painter
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from service_parts import fake_playground, service_of, serving, settings_of

# A machine that does other work as well takes its time.
expect.set_options(timeout=60_000)

OWN = "document.title='owned'"
HOSTILE = f'<script>{OWN}</script> "><img src=x onerror="{OWN}"> {{{{ 7*7 }}}} javascript:\''


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return settings_of(tmp_path_factory.mktemp("service") / "home")


@pytest.fixture(scope="module")
def hostile(settings):
    """A run in which every text that comes from outside tries to be more than text."""
    with open_store(settings) as store:
        sha256 = store.blobs.put_image(Image.new("RGB", (32, 32), "red"))
        place = {"run_id": "hostile", "sha256": sha256}
        read = Critique(valence=1, arousal=1, alignment=1, analysis=HOSTILE, suggestion=HOSTILE)
        store.append(
            RunStarted(
                run_id="hostile",
                prompt=HOSTILE,
                target=EmotionTarget(valence=1.0, arousal=0.0),
                seed=1,
                settings={HOSTILE: HOSTILE},
                warnings=[HOSTILE],
            ),
            Rewritten(
                run_id="hostile",
                prompt=HOSTILE,
                why=HOSTILE,
                changes=HOSTILE,
                model=HOSTILE,
                prompt_version="1",
            ),
            ImageGenerated(
                **place, prompt=HOSTILE, seed=1, model=HOSTILE, height=32, width=32, versions={HOSTILE: "1"}
            ),
            Critiqued(**place, critique=read, model=HOSTILE, prompt_version="1"),
            Rewarded(**place, name=HOSTILE, version="1", value=0.5),
            HumanFeedback(**place, comment=HOSTILE, labels=[HOSTILE[:50]]),
            RunFinished(run_id="hostile", status="completed", stop_reason="rounds_used", warnings=[HOSTILE]),
        )
    return "hostile"


class Gated(Painter):
    """Paints while the gate is open, so that a test decides how long a run takes."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    async def generate(self, requests):
        await asyncio.to_thread(self.gate.wait, 60)
        return await super().generate(requests)


@pytest.fixture(scope="module")
def painter():
    return Gated()


@pytest.fixture(scope="module")
def url(settings, hostile, painter):
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with pytest.MonkeyPatch.context() as patch:
        fake_playground(patch)
        with serving(service_of(settings, painter)) as address:
            yield address


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page_of(browser):
    """Makes pages; whatever they complain of fails the test."""
    said, contexts = [], []

    def make(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda it: said.append(it.text) if it.type in ("error", "warning") else None)
        page.on("pageerror", lambda it: said.append(str(it)))
        page.on("dialog", lambda it: said.append(f"dialog: {it.message}"))
        return page

    yield make
    for context in contexts:
        context.close()
    assert said == []


def start(page, url, prompt="a dog by the sea", review=False):
    page.goto(url)
    page.keyboard.press("n")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.locator("#new [data-pick]").click(position={"x": 150, "y": 150})
    if review:
        page.get_by_label("Ask me before each rewrite").check()
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/runs/"))
    return page.url


def test_a_person_starts_watches_reads_rates_and_compares(page_of, url, painter):
    page = page_of()
    painter.gate.clear()
    first = start(page, url)
    expect(page.locator(".badge")).to_have_text("running")
    loaded = page.evaluate("performance.timeOrigin")
    painter.gate.set()
    expect(page.locator("#round-0 .tile")).to_have_count(2)
    expect(page.locator("#round-1 ins")).not_to_be_empty()
    expect(page.locator(".badge")).to_have_text("completed")
    expect(page.locator(".tile .va")).to_have_count(4)
    assert page.evaluate("performance.timeOrigin") == loaded, "the page is the same one: nothing was reloaded"

    page.locator(".tile.best a.shot").click()
    sheet = page.get_by_role("dialog")
    expect(sheet).to_contain_text("a picture")
    expect(sheet).to_contain_text("more light")
    expect(sheet).to_contain_text("painter")
    page.keyboard.press("4")
    expect(sheet.locator(".said li")).to_contain_text("★4")
    sheet.get_by_label("Felt valence").fill("1.5")
    sheet.get_by_label("Labels").fill("keep, for the talk")
    sheet.get_by_label("Comment").fill("warm")
    sheet.get_by_role("button", name="Save").click()
    expect(sheet.locator(".said li").last).to_contain_text("warm")
    page.keyboard.press("f")
    expect(sheet.locator(".said li").last).to_contain_text("favourite")
    sheet.get_by_role("button", name="Make again").click()
    expect(sheet.locator(".again")).to_contain_text("the same pixels")
    title = sheet.get_by_role("heading").first.text_content()
    page.keyboard.press("ArrowLeft" if "picture 1" in title else "ArrowRight")
    expect(sheet.get_by_role("heading").first).not_to_have_text(title)
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(page.locator(".tile.best .heart")).to_be_visible()
    expect(page.locator(".tile.best .chip")).to_have_text(["keep", "for the talk"])
    page.get_by_role("link", name="Compare rounds").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Two rounds")
    expect(page.locator(".diff")).to_contain_text("prompt")
    page.get_by_label("Left").select_option(first.rpartition("/")[2])
    expect(page.get_by_role("heading", level=1)).to_have_text("Two runs")
    page.goto(url)
    page.locator("select[name=label]").select_option("keep")
    expect(page.locator("table.runs tbody tr")).to_have_count(1)
    page.goto(first)
    page.get_by_role("link", name="New run like this").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a dog by the sea")

    second = start(page, url, "a cat on the hill")
    expect(page.locator(".badge")).to_have_text("completed")
    page.goto(url)
    for each in (first, second):
        page.get_by_label(f"Compare {each.rpartition('/')[2]}").check()
    page.get_by_role("button", name="Compare two").click()
    expect(page.locator(".diff")).to_contain_text("a cat on the hill")
    expect(page.locator(".wipe img")).to_have_count(2)
    page.get_by_label("How much of each picture is seen").fill("20")


def test_a_person_starts_watches_and_steers_a_job(page_of, url, settings):
    page = page_of()
    page.goto(f"{url}/jobs")
    page.get_by_text("New distillation").click()
    page.get_by_role("spinbutton", name="Steps").fill("7")
    page.get_by_role("button", name="Start").first.click()
    page.wait_for_url(re.compile("/jobs/j-"))
    expect(page.locator(".badge")).to_have_text("queued")
    job, loaded = page.url.rpartition("/")[2], page.evaluate("performance.timeOrigin")
    with open_store(settings) as store:
        assert store.queue.take("me", kind="distill", id=job)
        folder = store.home / "jobs" / job
        training = folder / "out" / "training"
        (training / "samples").mkdir(parents=True)
        Image.new("RGB", (64, 32), "red").save(training / "samples" / "step-0000002.png")
        (folder / "log.txt").write_text(f"$ emoloop distill\n{HOSTILE}\n")
        (training / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
        expect(page.locator(".badge")).to_have_text("running")
        expect(page.locator("figcaption")).to_have_text("loss 1.5")
        expect(page.get_by_alt_text("Pictures at step 2")).to_be_visible()
        expect(page.locator("pre.log")).to_contain_text("<script>")
        assert page.evaluate("performance.timeOrigin") == loaded, "nothing was reloaded"
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".badge")).to_have_text("cancelled")
        expect(page.locator("#job")).to_contain_text("saving what it has")
        store.queue.release(job, "me")
    expect(page.locator("#job")).not_to_contain_text("saving what it has")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(".badge")).to_have_text("queued")
    found = Axe().run(page).response["violations"]
    assert not [it["id"] for it in found if it["impact"] in ("serious", "critical")]
    page.goto(f"{url}/jobs")
    expect(page.locator("table.runs")).to_contain_text("distill opd, 7 steps")
    with open_store(settings) as store:
        store.queue.cancel([job])


def test_a_person_answers_a_review(page_of, url):
    page = page_of()
    start(page, url, "a boat on the sea", review=True)
    page.get_by_label("Or the next prompt").fill("a red boat on the sea")
    page.get_by_label("For the rewriter").fill("more warmth")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#round-1 .tile")).to_have_count(2)
    expect(page.locator("#round-1 .prompt")).to_contain_text("red")
    expect(page.locator(".badge")).to_have_text("completed")


def test_the_list_is_searched_without_a_reload_and_grows_by_itself(page_of, url):
    page, other = page_of(), page_of()
    page.goto(url)
    page.keyboard.press("/")
    page.keyboard.type("lighthouse")
    expect(page.locator("#list")).to_contain_text("No run is like that")
    expect(page).to_have_url(re.compile("q=lighthouse"))  # to be kept, sent, gone back to
    start(other, url, "a lighthouse")
    expect(page.locator("table.runs tbody tr")).to_have_count(1)


def test_the_list_is_a_gallery_and_a_page_is_printed(page_of, url, hostile):
    page = page_of()
    page.goto(url)
    page.get_by_role("link", name="gallery").click()
    expect(page.locator(f".gallery #run-{hostile} img").first).to_be_visible()
    page.get_by_role("searchbox").fill(hostile)
    expect(page.locator(".gallery li")).to_have_count(1)
    page.goto(f"{url}/runs/{hostile}")
    page.emulate_media(media="print")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.locator(".top")).to_be_hidden()
    expect(page.get_by_role("link", name="Share")).to_be_hidden()


def test_a_run_is_cancelled_and_resumed(page_of, url, painter):
    page = page_of()
    painter.gate.clear()
    start(page, url, "a house")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".badge")).to_have_text("stopped")
    painter.gate.set()
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".badge")).to_have_text("completed")


def test_the_playground_answers_beside_the_base(page_of, url):
    page = page_of()
    page.goto(f"{url}/playground")
    page.locator("[data-pick]").click(position={"x": 40, "y": 120})
    assert float(page.get_by_label("Valence").input_value()) < 0
    page.get_by_label("Adapter’s strength").fill("0.5")
    expect(page.locator("output")).to_have_text("0.5")
    page.get_by_role("button", name="Paint").click()
    expect(page.locator(".answers > figure > img")).to_have_count(2)
    expect(page.locator(".answers .wipe img")).to_have_count(2)
    expect(page.locator(".answers")).to_contain_text("distilled at 0.5")
    expect(page.locator(".answers")).to_contain_text("read as")


def test_strange_strings_are_text(page_of, url, hostile):
    page = page_of()
    for path in ("/", f"/runs/{hostile}", f"/runs/{hostile}/0/0", f"/compare?run={hostile}&run={hostile}"):
        page.goto(url + path)
        expect(page.locator("body")).to_contain_text("<script>document.title='owned'</script>")
        expect(page.locator("body")).to_contain_text("{{ 7*7 }}")
        assert page.title() != "owned" and page.locator("img[src=x]").count() == 0
    page.goto(url + f"/?q={'%3Cscript%3Ealert(1)%3C/script%3E'}")
    expect(page.get_by_role("searchbox")).to_have_value("<script>alert(1)</script>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everybody_can_read_it(page_of, url, hostile, width, scheme):
    page = page_of(width, scheme)
    run = f"/runs/{hostile}"
    for path in (
        "/",
        "/jobs",
        "/playground",
        run,
        f"{run}/0/0",
        f"/compare?run={hostile}&run={hostile}",
        f"/compare?run={hostile}/0&run={hostile}/0",
        "/login",
    ):
        page.goto(url + path)
        page.wait_for_load_state("load")
        if path == "/":
            page.locator("#new summary").click()
        found = Axe().run(page).response["violations"]
        serious = [
            (it["id"], it["nodes"][0]["html"]) for it in found if it["impact"] in ("serious", "critical")
        ]
        assert not serious, path
        sideways = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert sideways <= 0, path


def test_a_bundle_opens_from_disk(page_of, settings, url, hostile, painter, tmp_path):
    page = page_of()
    run_id = start(page, url, "a dog on the hill").rpartition("/")[2]
    expect(page.locator(".badge")).to_have_text("completed")
    with page.expect_download() as shared:
        page.get_by_role("link", name="Share").click()
    shutil.unpack_archive(shared.value.path(), tmp_path / "shared", "zip")
    page = page_of()
    page.goto((tmp_path / "shared" / run_id / "index.html").as_uri())
    page.get_by_role("link", name="a dog on the hill").click()
    expect(page.locator(".tile")).to_have_count(4)
    assert page.evaluate("[...document.images].every(it => it.naturalWidth > 0)")
    with open_store(settings, read_only=True) as store:
        assert write_bundle(store, [run_id, hostile], tmp_path / "bundle") == 2
    page = page_of()
    asked = []
    page.on("request", lambda it: asked.append(it.url))
    page.goto((tmp_path / "bundle" / "index.html").as_uri())
    expect(page.locator("table.runs tbody tr")).to_have_count(2)
    assert page.evaluate("[...document.images].every(it => it.naturalWidth > 0)")
    page.get_by_role("link", name="a dog on the hill").click()
    expect(page.locator(".tile")).to_have_count(4)
    page.locator(".tile.best a.shot").click()
    expect(page.locator(".sheet")).to_contain_text("more light")
    page.go_back()
    page.go_back()
    page.get_by_role("link", name="Compare the two").click()
    expect(page.locator(".diff")).to_contain_text("a dog on the hill")
    assert page.title() != "owned"
    assert asked and all(it.startswith("file://") for it in asked)
    (tmp_path / "bundle" / "other").mkdir()
    with open_store(settings, read_only=True) as store, pytest.raises(UserError, match="not empty"):
        write_bundle(store, [run_id], tmp_path / "bundle")
