"""schemathesis against the server's own OpenAPI document: no 5xx, and every error in OpenAI's format."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
)

from tests.server.harness import ScriptedEngine, running

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
]


def explore(examples: int) -> int:
    """Call every operation `examples` times with valid and invalid data; returns the number of calls."""
    with running(ScriptedEngine()) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        calls = 0
        for result in schema.get_all_operations():
            for mode in GenerationMode:
                try:
                    calls += call_all(result.ok().as_strategy(generation_mode=mode), examples)
                except Unsatisfiable:  # a request without data cannot be invalid
                    assert mode == GenerationMode.NEGATIVE
        return calls


def call_all(strategy: SearchStrategy[schemathesis.Case], examples: int) -> int:
    """Make calls and check every answer; returns the number of calls."""
    calls = 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def call(case: schemathesis.Case) -> None:
        nonlocal calls
        calls += 1
        case.call_and_validate(checks=CHECKS)

    call()
    return calls


def test_a_few_calls_of_every_operation() -> None:
    assert explore(2) > 20


@pytest.mark.slow
@pytest.mark.timeout(0)  # a timeout within hypothesis looks like a flaky strategy
def test_many_calls_of_every_operation() -> None:
    assert explore(150) > 1000
