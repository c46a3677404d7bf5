"""Jobs: the queue's entries as the API and the pages show them, their supervisor, their log."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from typing import get_args

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from emoloop.cli.train import app as training
from emoloop.service import jobs as module
from emoloop.service import supervise as supervisor
from emoloop.service.jobs import JobRequest, environment
from emoloop.service.supervise import supervise
from emoloop.service.templates import curves
from emoloop.service.work import Service
from emoloop.settings import load_settings
from emoloop.traces.store import open_store
from service_parts import API, client_of, settings_of

DISTILL = {"kind": "distill", "objective": "sft", "where": ["since=7d"], "steps": 5}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.01)
    monkeypatch.setattr(supervisor, "_RENEW", 0.05)


@pytest.fixture
def settings(tmp_path):
    return settings_of(tmp_path)


@pytest.fixture
def service(settings):
    return Service(settings, models=False)


@pytest.fixture
async def client(service):
    async with client_of(service) as client:
        yield client


def python(code):
    """A command that runs some Python in place of a job's."""
    return lambda words: [sys.executable, "-c", code, *words]


def supervised(service, job_id, code):
    """Supervise as `emoloop job` does, whose output the server turns into the log."""
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from emoloop.service import supervise as it\nit._RENEW = .05\n"
        "from emoloop.traces.store import open_store\nfrom emoloop.settings import Settings\n"
        f"with open_store(Settings(home={str(service.store.home)!r})) as store:\n"
        f"    it.supervise(store, {job_id!r}, lambda words: [sys.executable, '-c', {code!r}, *words])\n"
    )
    with (service.jobs.folder(job_id) / "log.txt").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=log)


async def stream(client, url, **headers):
    """Server-sent events of an answer."""
    said, message = [], {}
    async with client.stream("GET", url, headers=headers) as response:
        async for line in response.aiter_lines():
            key, _, value = line.partition(": ")
            if key in ("id", "event", "data"):
                message[key] = message.get(key, "") + value
            elif not line and message:
                said.append(message)
                message = {}
    return said


async def test_one_key_starts_one_job_which_is_cancelled_and_resumed(client):
    key = {"Idempotency-Key": "mine"}
    answers = [await client.post(f"{API}/jobs", json=DISTILL, headers=key) for _ in range(2)]
    assert [it.status_code for it in answers] == [202, 202]
    [job_id] = {it.json()["id"] for it in answers}
    url = f"{API}/jobs/{job_id}"
    assert answers[0].headers["location"] == url
    job = (await client.get(url)).json()
    assert job["state"] == "queued" and job["request"]["objective"] == "sft"
    other = await client.post(f"{API}/jobs", json={**DISTILL, "steps": 6}, headers=key)
    assert other.status_code == 409
    assert [it["id"] for it in (await client.get(f"{API}/jobs")).json()] == [job_id]
    assert (await client.post(f"{url}/resume")).status_code == 409
    assert (await client.post(f"{url}/cancel")).json()["state"] == "cancelled"
    assert (await client.post(f"{url}/cancel")).status_code == 409
    assert (await client.post(f"{url}/resume")).json()["state"] == "queued"
    missing = f"{API}/jobs/j-{'0' * 20}"
    assert {(await client.get(it)).status_code for it in (missing, f"{missing}/log", f"{url}/samples/3")} == {
        404
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "distill", "objective": "my_pkg.my_mod:MyObjective"},
        {"kind": "distill", "where": ["--home=/"]},
        {"kind": "distill", "preset": "../secret"},
        {"kind": "eval", "suite": "/etc/passwd"},
        {"kind": "eval", "arms": ["mine=os:system"]},
        {"kind": "train", "data": "../elsewhere"},
        {"kind": "train", "data": "/etc"},
        {"kind": "collect", "lines": []},
        {"kind": "shell"},
    ],
)
async def test_a_request_names_no_code_and_no_file_outside(client, wrong):
    assert (await client.post(f"{API}/jobs", json=wrong)).status_code == 422


def test_requests_become_command_lines(tmp_path):
    def words(request):
        return JobRequest.model_validate(request).root.words(tmp_path, tmp_path / "home")

    assert words(DISTILL) == [
        "distill", "sft", f"--out={tmp_path}/out", "--resume", "--json", "--where=since=7d", "--set=train.steps=5",
    ]  # fmt: skip
    adapter = f"j-{'a' * 20}"
    compared = words({"kind": "eval", "adapter": adapter, "critic": adapter, "arms": ["loop", "loop+critic"]})
    assert compared[-3:] == [
        "--arms=loop,loop+critic",
        f"--adapter={tmp_path}/home/jobs/{adapter}/out",
        f"--critic={tmp_path}/home/jobs/{adapter}/out",
    ]
    line = {"prompt": "a dog", "target": {"valence": 1}}
    assert words({"kind": "collect", "lines": [line]})[:2] == ["collect", str(tmp_path / "prompts.jsonl")]
    assert json.loads((tmp_path / "prompts.jsonl").read_text())["target"] == {"valence": 1.0}
    assert str(tmp_path / "home" / "set-1") in words({"kind": "train", "data": "set-1"})
    flow = words({"kind": "flow-grpo", "start": adapter, "steps": 3})
    assert flow[:3] == ["train", "flow-grpo", f"--out={tmp_path}/out"]
    assert flow[-2:] == [f"--from={tmp_path}/home/jobs/{adapter}/out", "--set=train.steps=3"]


def test_each_verb_that_trains_is_a_job():
    kinds = {it.model_fields["kind"].default for it in get_args(get_args(module.AnyJob)[0])}
    verbs = {it.name or it.callback.__name__ for it in training.registered_commands if it.callback}
    assert "critic" in verbs and kinds == set(module.KINDS)
    assert {{"critic": "train"}.get(verb, verb) for verb in verbs} < kinds


async def test_a_report_is_a_page_that_may_do_nothing(client, service):
    job_id = (await client.post(f"{API}/jobs", json={"kind": "eval"})).json()["id"]
    url = f"{API}/jobs/{job_id}/report"
    assert (await client.get(url)).status_code == 404
    (service.jobs.folder(job_id) / "out").mkdir()
    (service.jobs.folder(job_id) / "out" / "report.html").write_text("<p>all well</p>")
    report = await client.get(url)
    assert report.text == "<p>all well</p>" and "sandbox" in report.headers["content-security-policy"]
    assert report.headers["x-content-type-options"] == "nosniff"
    assert (await client.get(f"{API}/jobs/{job_id}")).json()["report"]


async def test_forms_start_each_kind_of_job(client):
    forms = [
        {"kind": "eval", "suite": "dev", "limit": "2", "adapter": "", "critic": "", "arms": "base, loop"},
        {"kind": "flow-grpo", "where": "", "start": "", "steps": "5"},
        {"kind": "train", "data": "pictures", "steps": ""},
        {
            "kind": "collect",
            "prompts": "a dog\n\n a cat ",
            "valence": "2",
            "arousal": "-1",
            "rounds": "",
            "images": "2",
        },
    ]
    page = (await client.get("/jobs", headers={"Accept": "text/html"})).text
    for form in forms:
        assert f'name="kind" value="{form["kind"]}"' in page
        answer = await client.post("/jobs", data=form, headers={"Accept": "text/html"})
        assert answer.status_code == 303, answer.text
    jobs = [it["request"] for it in (await client.get(f"{API}/jobs")).json()][::-1]
    assert [it["kind"] for it in jobs] == [it["kind"] for it in forms]
    assert [it["prompt"] for it in jobs[-1]["lines"]] == ["a dog", "a cat"] and jobs[-1]["images"] == 2


async def test_a_job_runs_and_its_log_is_read_as_it_grows(client, service):
    job_id = (await client.post(f"{API}/jobs", json=DISTILL)).json()["id"]
    code = "import sys; print('a'); print('b', file=sys.stderr); sys.exit(int('fail' in sys.argv))"
    process = supervised(service, job_id, code)
    said = await stream(client, f"{API}/jobs/{job_id}/log")
    assert process.wait(60) == 0
    assert said[-1] == {"event": "state", "data": "done"}
    text = "".join(it["data"] for it in said[:-1])
    assert text.startswith("$ emoloop distill sft") and "a" in text and "b" in text
    rest = await stream(client, f"{API}/jobs/{job_id}/log", **{"Last-Event-ID": said[-2]["id"]})
    assert rest == said[-1:]
    page = (await client.get(f"/jobs/{job_id}", headers={"Accept": "text/html"})).text
    assert "$ emoloop distill sft" in page and "Cancel" not in page
    assert job_id in (await client.get("/jobs", headers={"Accept": "text/html"})).text


async def test_a_job_that_fails_says_why(client, service):
    job_id = (await client.post(f"{API}/jobs", json=DISTILL)).json()["id"]
    assert supervised(service, job_id, "raise SystemExit('no runs <b>here</b>')").wait(60) == 0
    job = (await client.get(f"{API}/jobs/{job_id}")).json()
    assert job["state"] == "failed" and job["error"] == "it ended with exit code 1: no runs <b>here</b>"
    page = (await client.get(f"/jobs/{job_id}", headers={"Accept": "text/html"})).text
    assert "<b>here" not in page and "&lt;b&gt;here" in page
    # What is not there to be taken is not run.
    assert not supervise(service.store, job_id, python("raise SystemExit(9)"))


def test_the_real_supervisor_runs_the_real_command(tmp_path):
    settings = settings_of(tmp_path)
    with open_store(settings) as store:
        jobs = module.Jobs(settings, store)
        job_id = jobs.start(JobRequest.model_validate({"kind": "eval", "suite": "nosuch"}), None).id
        assert jobs._supervised(job_id).wait(300) == 0
        job = jobs.get(job_id)
        assert job.state == "failed" and "exit code 2" in (job.error or "") and "nosuch" in jobs.tail(job_id)


async def test_a_cancelled_job_may_save_what_it_has(client, service):
    job_id = (await client.post(f"{API}/jobs", json=DISTILL)).json()["id"]
    code = (
        "import time\nprint('ready', flush=True)\n"
        "try: time.sleep(600)\nexcept KeyboardInterrupt: print('saved'); raise SystemExit(130)"
    )
    process = supervised(service, job_id, code)
    async for _, text in service.jobs.log(job_id, 0):
        if "ready" in text:
            break
    assert (await client.post(f"{API}/jobs/{job_id}/cancel")).json()["state"] == "cancelled"
    said = await stream(client, f"{API}/jobs/{job_id}/log")
    assert process.wait(60) == 0 and said[-2]["data"].endswith("saved") and said[-1]["data"] == "cancelled"


async def test_a_server_starts_what_waits_and_starts_it_again_when_its_supervisor_died(tmp_path, monkeypatch):
    settings = settings_of(tmp_path, jobs=1)
    started, both = [], threading.Event()

    class Supervisor:
        """Takes the job and dies, the first time; does it, the second."""

        def __init__(self, service, job_id):
            started.append(job_id)
            owner = f"{module.sys.modules['socket'].gethostname()}:999999999:x" if len(started) == 1 else "me"
            assert service._queue.take(owner, kind="distill", id=job_id)
            if len(started) == 2:
                service._queue.settle(job_id, owner, "done")
                both.set()

        def poll(self):
            return 0

    monkeypatch.setattr(module.Jobs, "_supervised", lambda self, job_id: Supervisor(self, job_id))
    async with client_of(Service(settings, models=False)) as client:
        job_id = (await client.post(f"{API}/jobs", json=DISTILL)).json()["id"]
        assert await asyncio.to_thread(both.wait, 60)
        job = (await client.get(f"{API}/jobs/{job_id}")).json()
    assert started == [job_id] * 2 and (job["state"], job["attempts"]) == ("done", 2)


async def test_a_training_shows_its_curves_and_samples(client, service):
    job_id = (await client.post(f"{API}/jobs", json=DISTILL)).json()["id"]
    training = service.jobs.folder(job_id) / "out" / "training"
    (training / "samples").mkdir(parents=True)
    (training / "samples" / "step-0000004.png").write_bytes(b"png")
    lines = [{"step": n, "loss": 2.0 / n, "guard/alignment": 0.5} for n in range(1, 1001)]
    (training / "metrics.jsonl").write_text(
        "\n".join(
            [*map(json.dumps, lines[:-1]), '{"step": 1000, "loss": 0.002, "guard/alignment": 0.5, "x": NaN}']
        )
        + '\n{"step": 10'
    )
    figures = (await client.get(f"{API}/jobs/{job_id}/metrics")).json()
    assert figures == lines
    job = (await client.get(f"{API}/jobs/{job_id}")).json()
    assert job["samples"] == [4] and job["figures"] == lines[-1]
    assert (await client.get(f"{API}/jobs/{job_id}/samples/4")).content == b"png"
    page = (await client.get(f"/jobs/{job_id}", headers={"Accept": "text/html"})).text
    assert "guard/alignment" in page and "samples/4" in page
    loss = curves(figures)[0]
    assert (loss.name, loss.low, loss.high, loss.step) == ("loss", 0.002, 2.0, 1000)
    assert len(loss.points) <= 250 and loss.points[0] == (0.001, 1.0)


async def test_a_form_starts_a_job(client):
    form = {"kind": "distill", "objective": "opd", "where": "since=7d, gain=0.2", "steps": "", "key": "k"}
    answer = await client.post("/jobs", data=form, headers={"Accept": "text/html"})
    assert answer.status_code == 303
    [job] = (await client.get(f"{API}/jobs")).json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["request"]["where"] == ["since=7d", "gain=0.2"] and job["request"]["steps"] is None


def test_jobs_have_the_servers_settings(tmp_path, monkeypatch):
    given = {
        "home": tmp_path / "home",
        "generator": {"steps": 3, "model": "x"},
        "loop": {"rounds": 2, "tolerance": 0.5},
        "service": {"token": "a-secret-of-the-server"},
    }
    settings = load_settings(given)
    variables = environment(settings)
    assert "secret" not in str(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    again = load_settings()
    assert (again.home, again.generator, again.loop) == (settings.home, settings.generator, settings.loop)


async def test_prometheus_scrapes_figures(tmp_path):
    from service_parts import REQUEST, ended, service_of

    async with client_of(service_of(settings_of(tmp_path))) as client:
        run_id = (await client.post(f"{API}/runs", json=REQUEST)).json()["run_id"]
        await ended(client, run_id)
        await client.post(f"{API}/jobs", json=DISTILL)
        for _ in range(2):  # nothing counts twice
            scraped = await client.get("/metrics")
        lines = dict(line.rsplit(" ", 1) for line in scraped.text.splitlines() if line[:1] != "#")
    wanted = {
        "emoloop_runs_started_total": 1,
        'emoloop_runs_finished_total{status="completed"}': 1,
        "emoloop_images_total": 4,
        'emoloop_lvlm_tokens_total{direction="input",role="critic"}': 40,
        'emoloop_lvlm_tokens_total{direction="output",role="rewriter"}': 5,
        'emoloop_lvlm_seconds_count{role="critic"}': 4,
        'emoloop_runs{status="completed"}': 1,
        'emoloop_queue{kind="distill",state="queued"}': 1,
        'emoloop_http_request_seconds_count{method="POST",route="/api/v1/runs",status="202"}': 1,
        "emoloop_server_ready": 1,
    }
    assert {name: float(lines[name]) for name in wanted} == wanted
    assert not [name for name in lines if "watch" in name]
