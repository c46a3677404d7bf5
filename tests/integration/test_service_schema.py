"""The API against its own OpenAPI document: no request is answered by a fault, each answer is as the document says."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service_parts import API, fake_playground, service_of, serving, settings_of

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    home = tmp_path_factory.mktemp("schema") / "home"
    with pytest.MonkeyPatch.context() as patch:
        fake_playground(patch)
        with serving(service_of(settings_of(home, runs=2))) as url:
            yield schemathesis.openapi.from_url(f"{url}{API}/openapi.json")


def test_each_operation_keeps_its_word(document):
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:

        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def asked(case):
            case.call_and_validate(checks=CHECKS, timeout=60)

        asked()


def test_each_operation_keeps_its_word_after_others(document):
    """Sequences: what an answer names is asked for, steered and judged; streams aside, which may last."""

    class Sequences(document.exclude(path_regex="/(watch|log)$").as_state_machine()):
        def validate_response(self, response, case, additional_checks=(), **keywords):
            case.validate_response(response, checks=CHECKS)

    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=15,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
