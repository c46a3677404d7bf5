"""The doctor: finds what is missing, names one remedy, hides secrets, and is bad only where it matters."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from emoloop import doctor
from emoloop.cli import app
from emoloop.settings import load_settings
from typer.testing import CliRunner


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"0" * 2**20)
    return str(folder)


def found(document, name):
    return next(check for check in document["checks"] if check["name"] == name)


def settings_of(tmp_path, model, **more):
    parts = {"generator": {"model": model}, "lvlm": {"model": model}, "home": tmp_path / "home"}
    return load_settings({**parts, **more})


def test_all_is_well(tmp_path, model, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    document = doctor.examine(settings_of(tmp_path, model))
    assert document["ok"], [check for check in document["checks"] if check["state"] == "missing"]
    assert "1 MiB" in found(document, "generator")["found"]
    assert "torch" in found(document, "packages")["found"]
    assert not (tmp_path / "home").exists()  # looking changes nothing
    assert all(check["remedy"] for check in document["checks"] if check["state"] != "ok")


def test_what_is_not_installed_is_mended_from_any_folder(tmp_path, model, monkeypatch):
    """There may be no checkout: pip finds the requirements in the installed package."""
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-one", "no-such-two; extra == 'train'"])
    document = doctor.examine(settings_of(tmp_path, model))
    assert found(document, "packages")["remedy"] == "pip install emoloop"
    assert found(document, "extra train")["remedy"] == "pip install 'emoloop[train]'"


def test_a_model_that_is_not_there(tmp_path, model):
    document = doctor.examine(settings_of(tmp_path, model, generator={"model": str(tmp_path / "nowhere")}))
    assert not document["ok"]
    check = found(document, "generator")
    assert check["state"] == "missing" and "nowhere" in check["found"] and check["remedy"]


def test_a_home_that_cannot_be_written(tmp_path, model):
    (tmp_path / "file").write_text("")
    document = doctor.examine(settings_of(tmp_path, model, home=tmp_path / "file" / "home"))
    assert found(document, "home")["state"] == "missing"


def test_an_adapter_that_is_not_there(tmp_path, model):
    settings = settings_of(tmp_path, model, generator={"model": model, "adapter": "nowhere"})
    assert found(doctor.examine(settings), "adapter")["state"] == "missing"


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"data": [{"id": "served"}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/v1"
        made.shutdown()
        thread.join()


def test_a_server_is_asked_what_it_serves(tmp_path, model, server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # for other machines

    def check(**lvlm):
        settings = settings_of(tmp_path, model, lvlm={"engine": "vllm", **lvlm})
        return found(doctor.examine(settings), "vLLM server")

    assert check(model="served", base_url=server)["state"] == "ok"
    assert check(model="served", base_url=server.removeprefix("http://"))["state"] == "ok"
    assert check(model="served", base_url="http://")["state"] == "missing"
    wrong = check(model="other", base_url=server)
    assert wrong["state"] == "missing" and "serves served, not other" in wrong["found"]
    gone = check(model="served", base_url="http://127.0.0.1:9/v1")
    assert gone["state"] == "missing" and "emoloop lvlm serve" in gone["remedy"]


def test_settings_in_force_without_secrets(tmp_path, model):
    document = doctor.examine(settings_of(tmp_path, model, lvlm={"model": model, "api_key": "s3cret"}))
    rows = {row["name"]: row for row in document["settings"]}
    assert rows["lvlm.api_key"] == {"name": "lvlm.api_key", "value": "(set)", "set": True}
    assert rows["loop.rounds"] == {"name": "loop.rounds", "value": 3, "set": False}
    assert "s3cret" not in json.dumps(document)


def test_the_verb_exits_1_and_prints_json(tmp_path, model, monkeypatch):
    monkeypatch.setenv("EMOLOOP_GENERATOR__MODEL", str(tmp_path / "nowhere"))
    monkeypatch.setenv("EMOLOOP_LVLM__MODEL", model)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    monkeypatch.setenv("EMOLOOP_GENERATOR__MODEL", model)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    assert "All that is needed is here" in result.stdout


def test_ones_own_generator_is_not_called_missing_and_not_run(tmp_path, model):
    settings = settings_of(tmp_path, model, generator={"model": "no_such_module:make"})
    check = found(doctor.examine(settings), "generator")
    assert check["state"] == "ok" and "your own code" in check["found"]


def test_no_interpreter_of_the_settings_is_run(tmp_path, model):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    python.chmod(0o755)
    settings = settings_of(tmp_path, model, lvlm={"model": model, "vllm_python": str(python)})
    assert found(doctor.examine(settings), "vllm")["state"] == "missing"
    (tmp_path / "env/lib/python3.12/site-packages/vllm-0.33.0.dist-info").mkdir(parents=True)
    check = found(doctor.examine(settings), "vllm")
    assert check["state"] == "ok" and "vllm 0.33.0" in check["found"]
    assert not (tmp_path / "ran").exists()


def test_the_endpoint_of_traces_alone_is_seen_and_passwords_are_not(tmp_path, model, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://me:s3cret@127.0.0.1:9/v1/traces")
    base_url = "http://me:s3cret@127.0.0.1:9/v1"
    settings = settings_of(tmp_path, model, lvlm={"engine": "vllm", "base_url": base_url})
    document = doctor.examine(settings)
    assert "127.0.0.1:9/v1/traces" in found(document, "tracing")["found"]
    assert "s3cret" not in json.dumps(document)


def test_what_is_printed_is_no_markup(monkeypatch, capsys):
    from emoloop.cli import evals_view

    checks = [
        {"name": "extra [x]", "state": "optional", "found": "[dim]", "remedy": "pip install '.[postgres]'"}
    ]
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"name": "home", "value": "/a/[b]/c", "set": True}]
    evals_view.show_doctor({"ok": True, "checks": checks, "settings": rows})
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[x]", "[dim]", "'.[postgres]'", "/a/[b]/c"))
