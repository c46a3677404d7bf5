"""The API against a real log: what it starts, shows, takes and refuses."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import painter
from emoloop.domain import EmotionTarget, RunStatus, StopReason, UserError
from emoloop.events import ImageGenerated, RunFinished, RunStarted
from emoloop.service.access import _Clients, check, session
from emoloop.service.work import Service, watched
from emoloop.settings import ServiceSettings, load_settings
from emoloop.traces.store import open_store
from painter import Painter
from PIL import Image
from service_parts import API, REQUEST, client_of, ended, fake_playground, service_of, serving, settings_of
from starlette.requests import Request


@pytest.fixture
def service(tmp_path):
    return service_of(settings_of(tmp_path))


@pytest.fixture
async def client(service):
    async with client_of(service) as client:
        yield client


async def test_a_run_is_started_watched_and_read(client):
    started = await client.post(f"{API}/runs", json=REQUEST)
    assert started.status_code == 202
    run_id = started.json()["run_id"]
    assert started.headers["location"] == f"{API}/runs/{run_id}"
    said = await ended(client, run_id)
    events = [json.loads(it["data"]) for it in said if it["event"] != "state"]
    assert [it["seq"] for it in events] == list(range(len(events)))
    assert [it["event"] for it in said if it["event"] == "state"] and said[-1]["data"] == "completed"
    assert events[-1]["type"] == "run_finished"

    run = (await client.get(f"{API}/runs/{run_id}")).json()
    assert (
        run["run"]["state"] == "completed"
        and len(run["rounds"]) == 2
        and run["cursor"] == int(said[-2]["id"])
    )
    [proposal] = run["rounds"][1]["proposals"]
    assert proposal["prompt"].startswith("a dog by the sea ")
    assert "".join(text for kind, text in proposal["diff"] if kind != "-") == proposal["prompt"]
    assert [it["index"] for it in proposal["candidates"]] == [0, 1]
    assert {it["recipe"]["model"] for it in proposal["candidates"]} == {"painter"}
    assert sum(it["best"] for r in run["rounds"] for p in r["proposals"] for it in p["candidates"]) == 1
    assert run["tokens"] == {"input": 50, "output": 25}
    assert run["cost"] is None, "no price is set"


async def test_prices_say_what_a_run_cost(client, service):
    service.settings.service = ServiceSettings(input_price=2.0, output_price=8.0)
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    run = (await client.get(f"{API}/runs/{run_id}")).json()
    assert run["cost"] == pytest.approx((50 * 2 + 25 * 8) / 1e6)
    assert "<dt>Cost</dt>" in (await client.get(f"/runs/{run_id}")).text


async def test_watching_goes_on_after_the_last_event_seen(client):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    said = await ended(client, run_id)
    # A run that has ended says so last, whoever comes when.
    assert [it["event"] for it in said].count("state") == 1 and said[-1]["data"] == "completed"
    whole = [it for it in said if "id" in it]
    url, half = f"{API}/runs/{run_id}/watch", whole[len(whole) // 2]["id"]
    rest = await client.get(url, headers={"Last-Event-ID": half})
    ids = [line[4:] for line in rest.text.splitlines() if line.startswith("id: ")]
    assert ids == [it["id"] for it in whole if int(it["id"]) > int(half)]
    assert (await client.get(url, headers={"Last-Event-ID": whole[-1]["id"]})).status_code == 204
    listed = (await client.get(f"{API}/runs/{run_id}/events", params={"after": half})).json()
    assert len(listed["items"]) == len(ids) and listed["next"] is None


async def test_one_key_starts_one_run(client):
    key = {"Idempotency-Key": "mine"}
    answers = await asyncio.gather(*(client.post(f"{API}/runs", json=REQUEST, headers=key) for _ in range(3)))
    [run_id] = {it.json()["run_id"] for it in answers}
    await ended(client, run_id)
    assert (await client.post(f"{API}/runs", json=REQUEST, headers=key)).json()["run_id"] == run_id
    for other in ({"prompt": "a cat"}, {"rounds": 1}):
        refused = await client.post(f"{API}/runs", json={**REQUEST, **other}, headers=key)
        assert refused.status_code == 409
    assert (await client.get(f"{API}/runs")).json()["total"] == 1


async def test_a_run_is_cancelled_and_resumed(tmp_path):
    painter = Painter(delay=30)  # it is still at work when it is cancelled
    async with client_of(service_of(settings_of(tmp_path), painter)) as client:
        run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
        stopped = await client.post(f"{API}/runs/{run_id}/cancel")
        assert stopped.status_code == 202 and stopped.json()["state"] == "stopped"
        assert (await client.post(f"{API}/runs/{run_id}/cancel")).status_code == 409
        assert (await client.get(f"{API}/runs", params={"state": "stopped"})).json()["total"] == 1
        painter.delay = 0.02
        resumed = await client.post(f"{API}/runs/{run_id}/resume")
        assert resumed.json()["state"] == "running"
        assert (await ended(client, run_id))[-1]["data"] == "completed"
        assert (await client.post(f"{API}/runs/{run_id}/resume")).status_code == 409
        assert len({(it.prompt, it.seed) for it in painter.requests}) == 4


async def test_a_run_waits_for_its_review(client, service):
    run_id = (await client.post(f"{API}/runs", json={**REQUEST, "review": True})).json()["run_id"]
    async for _, state in watched(service, run_id, 0, await service.state(run_id)):
        if state == "waiting":
            break
    run = (await client.get(f"{API}/runs/{run_id}")).json()
    assert run["run"]["state"] == "waiting" and run["question"]["tried"] == "a dog by the sea"
    assert [it["state"] for it in (await client.get(f"{API}/runs")).json()["items"]] == ["waiting"]
    assert (await client.post(f"{API}/runs/{run_id}/resume")).status_code == 409
    answer = {"prompt": "a dog on the hill", "comment": "another place"}
    assert (await client.post(f"{API}/runs/{run_id}/review", json=answer)).status_code == 202
    assert (await ended(client, run_id))[-1]["data"] == "completed"
    run = (await client.get(f"{API}/runs/{run_id}")).json()
    assert run["rounds"][1]["proposals"][0]["prompt"] == "a dog on the hill"
    assert run["rounds"][1]["proposals"][0]["writer"] == "human"
    assert (await client.post(f"{API}/runs/{run_id}/review", json={})).status_code == 409


async def test_a_run_that_waited_before_the_models_came_is_seen_to_wait_once_they_have(service, monkeypatch):
    async with client_of(service) as client:
        run_id = (await client.post(f"{API}/runs", json={**REQUEST, "review": True})).json()["run_id"]
        async for _, state in watched(service, run_id, 0, await service.state(run_id)):
            if state == "waiting":
                break
        service._waits.clear()
        with monkeypatch.context() as loading:
            loading.setattr(type(service), "ready", False)
            assert await service.state(run_id) == "stopped"
        assert await service.state(run_id) == "waiting"


async def test_a_failed_run_is_running_everywhere_while_it_is_gone_on_with(client, service):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    # The log says that a run is complete before its task has ended.
    await asyncio.gather(*service._tasks.values())
    failed = RunFinished(run_id=run_id, status=RunStatus.FAILED, stop_reason=StopReason.ERROR, node="again")
    service.store.append(failed)
    assert await service.state(run_id) == (await service.run(run_id)).state == "failed"
    service._tasks[run_id] = asyncio.create_task(asyncio.sleep(0))
    assert await service.state(run_id) == (await service.run(run_id)).state == "running"
    [row] = (await client.get(f"{API}/runs")).json()["items"]
    assert row["state"] == "running"


def test_the_service_loads_no_statistics_and_no_models():
    heavy = "{'scipy', 'sklearn', 'pandas', 'torch', 'transformers', 'diffusers'}"
    code = f"import sys, emoloop.service.app, emoloop.service.work; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


async def test_feedback_is_an_event(client):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    sha256 = (await client.get(f"{API}/runs/{run_id}")).json()["run"]["best_sha256"]
    url = f"{API}/runs/{run_id}/feedback"
    for said in (
        {"rating": 4},
        {"rating": 2, "valence": -0.5},
        {"favourite": True},
        {"comment": "<b>hm</b>"},
    ):
        taken = await client.post(url, json={"sha256": sha256, **said})
        assert taken.status_code == 201 and said.items() <= taken.json().items()
    assert (await client.post(url, json={"comment": "all in all"})).status_code == 201
    run = (await client.get(f"{API}/runs/{run_id}")).json()
    shots = [it for r in run["rounds"] for p in r["proposals"] for it in p["candidates"]]
    [best] = [it for it in shots if it["best"]]
    assert [it["rating"] for it in best["feedback"]] == [4, 2, None, None]
    assert [it["comment"] for it in run["feedback"]] == ["all in all"]
    for labels in (["keep", " too dark "], ["keep"]):
        assert (await client.post(url, json={"sha256": sha256, "labels": labels})).status_code == 201
    assert (await client.post(url, json={"labels": ["for the talk"]})).status_code == 201
    for wanted, count in (("keep", 1), ("for the talk", 1), ("♥", 1), ("too dark", 0)):
        listed = (await client.get(f"{API}/runs", params={"label": wanted})).json()
        assert listed["total"] == count
    assert (await client.get(f"{API}/runs")).json()["items"][0]["labels"] == ["for the talk", "keep", "♥"]
    for wrong in (["a,b"], ["♥"], [" "], ["a" * 61]):
        assert (await client.post(url, json={"labels": wrong})).status_code == 422
    assert (await client.post(url, json={"sha256": "0" * 64, "rating": 3})).status_code == 404
    assert (await client.post(url, json={"sha256": sha256})).status_code == 422
    events = (await client.get(f"{API}/runs/{run_id}/events")).json()["items"]
    assert [it["type"] for it in events].count("human_feedback") == 8


async def test_pictures_keep_for_a_year(client):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    sha256 = (await client.get(f"{API}/runs/{run_id}")).json()["run"]["best_sha256"]
    whole = await client.get(f"{API}/images/{sha256}")
    assert whole.headers["content-type"] == "image/png" and "immutable" in whole.headers["cache-control"]
    tag = {"If-None-Match": whole.headers["etag"]}
    assert (await client.get(f"{API}/images/{sha256}", headers=tag)).status_code == 304
    small = await client.get(f"{API}/images/{sha256}/thumbnail", params={"side": 96})
    assert (
        Image.open(io.BytesIO(small.content)).size == (16, 16)
        and small.headers["content-type"] == "image/webp"
    )
    for bad in ("0" * 64, "../events.db", "..%2fevents.db"):
        assert (await client.get(f"{API}/images/{bad}")).status_code in (404, 422)


async def test_a_picture_that_claims_to_be_huge_is_not_opened(tmp_path):
    settings = settings_of(tmp_path)
    with open_store(settings) as store:
        buffer = io.BytesIO()
        Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
        bomb, junk = store.blobs.put_bytes(buffer.getvalue(), "png"), store.blobs.put_bytes(b"junk", "png")
    async with client_of(Service(settings, models=False)) as client:
        for sha256 in (bomb, junk):
            assert (await client.get(f"{API}/images/{sha256}/thumbnail")).status_code == 422


async def test_the_list_is_filtered_sorted_and_paged(tmp_path):
    settings = settings_of(tmp_path)
    with open_store(settings) as store:
        for number in range(7):
            subject = ("dog", "cat")[number % 2]
            target = EmotionTarget(valence=1.0)
            store.append(RunStarted(run_id=f"r{number}", prompt=f"a {subject} 100%", target=target, seed=1))
    async with client_of(Service(settings, models=False)) as client:

        async def ids(**wanted):
            found, after = [], ""
            while after is not None:
                page = (await client.get(f"{API}/runs", params={**wanted, "limit": 2, "after": after})).json()
                found += [it["run_id"] for it in page["items"]]
                after = page["next"]
            assert len(found) == page["total"]
            return found

        newest = [f"r{number}" for number in reversed(range(7))]
        assert await ids() == newest and await ids(sort="oldest") == newest[::-1]
        assert sorted(await ids(sort="gain")) == sorted(await ids(sort="updated")) == sorted(newest)
        assert await ids(q="cat") == ["r5", "r3", "r1"] and await ids(q="r4") == ["r4"]
        assert await ids(q="100%") == newest and await ids(q="1%0") == []
        assert await ids(state="running") == [] and len(await ids(state="stopped")) == 7
        token = (await client.get(f"{API}/runs", params={"limit": 2})).json()["next"]
        for wrong in ({"after": token, "sort": "gain"}, {"after": "abc"}, {"limit": 0}, {"nothing": 1}):
            assert (await client.get(f"{API}/runs", params=wrong)).status_code == 422
        refused = await client.post(f"{API}/runs", json=REQUEST)
        assert refused.status_code == 503 and refused.headers["retry-after"]


async def test_each_candidate_shows_its_own_prompt(tmp_path):
    settings = settings_of(tmp_path)
    with open_store(settings) as store:
        store.append(RunStarted(run_id="r", prompt="a dog", target=EmotionTarget(valence=1.0), seed=1))
        for index, prompt in enumerate(("a red dog", "a calm dog", "a red dog")):
            place = {"run_id": "r", "index": index, "sha256": f"{index}" * 64, "seed": index}
            store.append(ImageGenerated(**place, prompt=prompt, model="m", height=8, width=8))
    async with client_of(Service(settings, models=False)) as client:
        run = (await client.get(f"{API}/runs/r")).json()
        page = (await client.get("/runs/r", headers={"Accept": "text/html"})).text
    assert set(run["seconds"]) == {"wall"} and run["tokens"] == {}, "what nobody measured stays unknown"
    assert "a<ins> red</ins> dog" in page and "a<ins> calm</ins> dog" in page
    [round_] = run["rounds"]
    shown = [(it["prompt"], [shot["index"] for shot in it["candidates"]]) for it in round_["proposals"]]
    assert shown == [("a red dog", [0, 2]), ("a calm dog", [1])]
    assert round_["proposals"][1]["diff"] == [["=", "a"], ["+", " calm"], ["=", " dog"]]


async def test_the_playground_paints_with_and_without_the_adapter(client, monkeypatch):
    fake_playground(monkeypatch)
    wanted = {key: REQUEST[key] for key in ("prompt", "target", "seed")}
    pictures = {}
    for scale in (0.0, 1.0):
        base, distilled = (await client.post(f"{API}/playground", json={**wanted, "scale": scale})).json()
        assert (base["name"], distilled["name"]) == ("base", "distilled")
        assert base["reading"]["analysis"] == "a picture"
        pictures[scale] = base["image"], distilled["image"]
        assert base["image"].startswith("data:image/png;base64,")
    assert pictures[0.0][0] == pictures[0.0][1] == pictures[1.0][0] != pictures[1.0][1]
    assert (await client.get(f"{API}/runs")).json()["total"] == 0


async def test_the_playground_answers_by_the_artifact_of_a_job(client, service, monkeypatch):
    fake_playground(monkeypatch)
    job = (await client.post(f"{API}/jobs", json={"kind": "distill"})).json()["id"]
    wanted = {**{key: REQUEST[key] for key in ("prompt", "target", "seed")}, "read": False}
    assert (await client.post(f"{API}/playground", json={**wanted, "adapter": job})).status_code == 409
    assert service.store.queue.take("me", kind="distill", id=job)
    service.store.queue.settle(job, "me", "done")
    played = (await client.post(f"{API}/playground", json={**wanted, "adapter": job, "beside": job})).json()
    assert [it["name"] for it in played] == ["other", "distilled"] and played[0]["image"] == played[1][
        "image"
    ]
    assert set(service.playground._loaded) == {str(service.jobs.folder(job) / "out")}
    page = (await client.get(f"/playground?adapter={job}", headers={"Accept": "text/html"})).text
    assert f'<option value="{job}" selected>' in page
    answer = await client.post(
        "/playground", data={"prompt": "a dog", "valence": "1", "arousal": "0", "beside": job, "adapter": job}
    )
    assert "another adapter" in answer.text and "data-wipe" in answer.text


async def test_a_picture_is_made_again(client, service, monkeypatch):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    sha256 = (await client.get(f"{API}/runs/{run_id}")).json()["run"]["best_sha256"]
    again = (await client.post(f"{API}/runs/{run_id}/images/{sha256}/again")).json()
    assert again["same"] and again["difference"] == 0 and again["changed"] == []
    paint = painter._paint
    monkeypatch.setattr(painter, "_paint", lambda it: paint(it).point(lambda shade: min(shade + 9, 255)))
    html = {"Accept": "text/html"}
    page = (await client.post(f"/runs/{run_id}/0/0/again", headers=html)).text
    assert "other pixels" in page and "up to 9 of 255" in page
    for wrong in (f"{run_id}/images/{'0' * 64}", f"nothing/images/{sha256}"):
        assert (await client.post(f"{API}/runs/{wrong}/again")).status_code == 404
    service.store.blobs.path(sha256).unlink()
    assert (await client.post(f"{API}/runs/{run_id}/images/{sha256}/again")).status_code == 404


async def test_two_rounds_are_compared(client):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)

    async def page(*names):
        answer = await client.get("/compare", params={"run": names}, headers={"Accept": "text/html"})
        return answer.status_code, answer.text

    status, text = await page(f"{run_id}/0", f"{run_id}/1")
    assert status == 200 and "Two rounds" in text and text.count("<h3>Round") == 2
    named = re.findall('<th scope="row">(.+?)</th>', text)
    assert "prompt" in named and not {"model", "wanted.seed", "settings.loop.rounds"} & set(named)
    assert (await page(run_id, run_id))[1].count("<h3>Round") == 4
    assert (await page(f"{run_id}/7", run_id))[0] == 404 and (await page(run_id))[0] == 422


async def test_a_form_sets_labels_and_begins_like_another_run(client):
    run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    await ended(client, run_id)
    html = {"Accept": "text/html"}
    for _ in range(2):  # what is there already is not said again
        await client.post(f"/runs/{run_id}/0/0/feedback", data={"labels": "keep,, too dark", "rating": "4"})
    await client.post(f"/runs/{run_id}/feedback", data={"labels": "talk"})
    events = (await client.get(f"{API}/runs/{run_id}/events")).json()["items"]
    said = [it["labels"] for it in events if it["type"] == "human_feedback"]
    assert said == [["keep", "too dark"], None, ["talk"]]
    page = (await client.get(f"/runs/{run_id}", headers=html)).text
    assert page.count('<span class="chip">too dark</span>') == 1 and '<span class="chip">talk</span>' in page
    await client.post(f"/runs/{run_id}/0/0/feedback", data={"labels": ""})
    listed = (await client.get("/?label=talk", headers=html)).text
    assert run_id in listed and "too dark" not in listed
    like = (await client.get(f"/?like={run_id}", headers=html)).text
    assert 'value="a dog by the sea"' in like and 'value="3"' in like
    assert (await client.get("/?like=nothing", headers=html)).status_code == 404


async def test_a_playground_without_an_adapter_says_so(tmp_path):
    service = service_of(load_settings({"generator": {"model": "other"}}, settings_of(tmp_path)))
    async with client_of(service) as client:
        wanted = {key: REQUEST[key] for key in ("prompt", "target")}
        answer = await client.post(f"{API}/playground", json=wanted)
        assert answer.status_code == 503 and "--adapter" in answer.json()["detail"]


async def test_no_more_runs_than_may_be(tmp_path):
    async with client_of(service_of(settings_of(tmp_path, runs=1), Painter(delay=0.05))) as client:
        first = await client.post(f"{API}/runs", json=REQUEST)
        refused = await client.post(f"{API}/runs", json=REQUEST)
        assert (first.status_code, refused.status_code) == (202, 429)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/runs/nothing", None, 404),
        ("GET", "/runs/nothing/watch", None, 404),
        ("POST", "/runs/nothing/cancel", None, 404),
        ("GET", "/runs/..%2f..%2fetc", None, 404),
        ("GET", "/nothing", None, 404),
        ("PUT", "/runs", None, 405),
        ("POST", "/runs", {"prompt": "a dog"}, 422),
        ("POST", "/runs", {**REQUEST, "prompt": " "}, 422),
        ("POST", "/runs", {**REQUEST, "prompt": "\ud800"}, 422),
        ("POST", "/runs", {**REQUEST, "target": {"valence": 4}}, 422),
        ("POST", "/runs", {**REQUEST, "rounds": 1000}, 422),
    ],
)
async def test_errors_are_problem_documents(client, method, path, body, status):
    content = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = await client.request(method, f"{API}{path}", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status and answer.json()["title"]


async def test_who_may_ask(tmp_path):
    token = "0123456789abcdef"
    service = Service(settings_of(tmp_path, token=token, hosts="pictures.example"), models=False)
    async with client_of(service) as client:
        url = f"{API}/runs"

        async def status(method="GET", path=url, **headers):
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            return (await client.request(method, path, headers=named)).status_code

        assert await status() == 401 and await status(Authorization="Bearer wrong") == 401
        assert await status(Authorization=f"Bearer {token}") == 200
        assert await status(Cookie=f"emoloop={session(token)}") == 200
        assert await status(Cookie=f"emoloop={token}") == 401
        assert await status(path="/healthz") == await status(path="/readyz") == 200
        let_in = {"Authorization": f"Bearer {token}"}
        assert await status(**let_in, Host="evil.example") == 421
        assert (
            await status(**let_in, Host="pictures.example")
            == await status(**let_in, Host="10.1.2.3:80")
            == 200
        )
        forged = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
        for headers in forged:
            assert await status("POST", **let_in, **headers) == 403
        assert await status("POST", **let_in, Origin="http://localhost") == 422  # no body
        answer = await client.get("/", headers={"Accept": "text/html"})
        assert answer.status_code == 303 and answer.headers["location"] == "/login"
        assert "script-src 'self'" in answer.headers["content-security-policy"]


async def test_bodies_are_bounded(tmp_path):
    async with client_of(Service(settings_of(tmp_path, body_bytes=1000), models=False)) as client:
        assert (await client.post(f"{API}/runs", json={"prompt": "a" * 2000})).status_code == 413

        async def chunks():
            for _ in range(50):
                yield b"[" * 100

        assert (await client.post(f"{API}/runs", content=chunks())).status_code == 413


async def test_a_client_from_elsewhere_has_limits(tmp_path):
    token = "0123456789abcdef"
    settings = settings_of(tmp_path, token=token, client_requests=3, client_answers=1)
    async with client_of(Service(settings, models=False)) as client:
        app = client._transport.app

        async def asked(host, count):
            transport = httpx.ASGITransport(app, client=(host, 1))
            headers = {"Authorization": f"Bearer {token}"}
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=headers
            ) as it:
                return [(await it.get(f"{API}/runs")).status_code for _ in range(count)]

        assert await asked("10.0.0.7", 4) == [200, 200, 200, 429]
        assert await asked("10.0.0.8", 1) == [200]
        assert await asked("127.0.0.1", 5) == [200] * 5
        clients = _Clients(settings.service)
        [one, other] = (
            Request({"type": "http", "client": (host, 1), "headers": []}) for host in ("10.0.0.9", "::1")
        )
        assert clients.enter(one) is None and clients.enter(one)[0] == 429
        clients.leave(one)
        assert clients.enter(one) is None
        assert [clients.enter(other) for _ in range(9)] == [None] * 9 and set(clients._left) == {"10.0.0.9"}


def test_a_slow_client_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("emoloop.service.server.HEAD", 0.05)
    monkeypatch.setattr("emoloop.service.server._IDLE", 0.05)
    monkeypatch.setattr("emoloop.service.access._BODY", 0.05)
    with serving(Service(settings_of(tmp_path), models=False)) as url:
        place = url.removeprefix("http://").split(":")

        def said(*pieces):
            with socket.create_connection((place[0], int(place[1])), timeout=60) as it:
                for piece in pieces:
                    it.sendall(piece)
                return b"".join(iter(lambda: it.recv(4096), b""))

        get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        assert said() == said(get) == b""  # closed, though nothing was asked, or not to the end
        answer = said(get + b"\r\n" + get)  # the first is answered, the second never ends
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1
        post = b"POST /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
        assert said(post).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "pictures.example"])
def test_an_open_address_needs_a_token_or_a_proxy(host):
    with pytest.raises(UserError, match="EMOLOOP_SERVICE__TOKEN"):
        check(ServiceSettings(host=host))
    check(ServiceSettings(host=host, token="0123456789abcdef"))
    check(ServiceSettings(host=host, behind_proxy=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_needs_nothing(host):
    check(ServiceSettings(host=host))


async def test_the_openapi_document_is_whole(client):
    document = (await client.get(f"{API}/openapi.json")).json()
    operations = [it for path in document["paths"].values() for it in path.values()]
    assert len(operations) > 12 and all(
        it.get("description") and it["responses"]["default"] for it in operations
    )
    assert document["components"]["schemas"]["RunRequest"]["examples"]


async def test_a_run_whose_worker_died_is_gone_on_with(tmp_path):
    settings = settings_of(tmp_path)
    async with client_of(service_of(settings, Painter(delay=0.02))) as client:
        run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
    with open_store(settings) as store:
        assert store.run(run_id).status == "running"
        store.queue.claim(run_id, f"{socket.gethostname()}:999999999:x", 60)
    service = service_of(settings)
    async with client_of(service) as client:
        await service.loop()
        assert (await client.get("/readyz")).status_code == 200
        assert (await ended(client, run_id))[-1]["data"] == "completed"
