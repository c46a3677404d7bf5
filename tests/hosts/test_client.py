"""A typed client, generated from the OpenAPI document by openapi-python-client, drives the service."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from emoloop.service.app import create_app
from hosts.environments import program
from service_parts import service_of, serving, settings_of

CONFIG = """
package_name_override: emoloop_client
post_hooks: []
content_type_overrides:
  application/zip: application/octet-stream
  image/png: application/octet-stream
  image/webp: application/octet-stream
"""

USE = """
import sys
from emoloop_client import Client
from emoloop_client.api.health import alive, metrics
from emoloop_client.api.jobs import cancel_job, get_job, list_jobs, start_job
from emoloop_client.api.runs import get_run, give_feedback, list_runs, start_run
from emoloop_client.models import DistillJob, DistillJobObjective, EmotionTarget, Feedback, RunRequest

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
assert alive.sync(client=client)["status"] == "ok"
wanted = RunRequest(prompt="a dog by the sea", target=EmotionTarget(valence=2.0, arousal=-1.0), seed=3)
run = start_run.sync(client=client, body=wanted, idempotency_key="mine")
assert start_run.sync(client=client, body=wanted, idempotency_key="mine").run_id == run.run_id
while (document := get_run.sync(run.run_id, client=client)).run.state in ("running", "stopped"):
    pass
assert document.run.state == "completed" and len(document.rounds) == 2
said = give_feedback.sync(
    run.run_id, client=client, body=Feedback(sha256=document.run.best_sha256, rating=4.0, favourite=True)
)
assert said.rating == 4 and list_runs.sync(client=client).total == 1
job = start_job.sync(client=client, body=DistillJob(kind="distill", objective=DistillJobObjective.SFT, steps=5))
assert get_job.sync(job.id, client=client).request.objective == "sft"
assert cancel_job.sync(job.id, client=client).state == "cancelled"
assert [it.id for it in list_jobs.sync(client=client)] == [job.id]
assert get_run.sync_detailed("no-such-run", client=client).status_code == 404
print("all well")
"""


def test_a_generated_client_is_typed_and_works(tmp_path):
    generator = program("client", "openapi-python-client")
    if generator is None:
        pytest.skip("no client: python tests/hosts/environments.py")
    service = service_of(settings_of(tmp_path / "home"))
    document = create_app(service).openapi()
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "config.yaml").write_text(CONFIG)
    made = subprocess.run(
        [
            str(generator), "generate", "--path", "openapi.json", "--config", "config.yaml", "--meta", "none",
            "--output-path", "emoloop_client", "--fail-on-warning",
        ],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    with serving(service) as url:
        used = subprocess.run(
            [str(generator.with_name("python")), "-c", USE, url],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
    assert used.returncode == 0, used.stdout + used.stderr
    assert used.stdout.strip() == "all well"
