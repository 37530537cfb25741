"""Bodies that nobody thought of: whatever is sent, the service answers as it says in its description, and never with a 500."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import HELLO, Running, config_for, save_models

from fastalign.errors import DataError
from fastalign.serve.openapi import document
from fastalign.serve.wire import (
    ApiError,
    parse_chat,
    parse_feedback,
    parse_metrics,
    parse_promotion,
    parse_rollback,
    parse_version,
    read_object,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(
    {key for schema in document("m", open_service=True)["components"]["schemas"].values() for key in schema.get("properties", {})}
)
GOOD = {
    "model": st.just("tiny"), "messages": st.just(HELLO), "answer": st.just("a") | st.text(), "thumb": st.sampled_from(["up", "down"]),
    "name": st.text(max_size=70), "folder": st.text(max_size=30), "metrics": st.dictionaries(st.text(), st.floats() | st.text()),
}  # fmt: skip
BODIES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=4).flatmap(
    lambda body: st.fixed_dictionaries({}, optional=GOOD).map(lambda good: {**good, **body})
)
PARSERS = [parse_chat, lambda body: parse_feedback(body, str), parse_version, parse_metrics, parse_promotion, parse_rollback]


@settings(max_examples=400, deadline=None)
@given(BODIES)
def test_every_body_is_taken_or_refused_with_a_reason(body: dict):
    for parse in PARSERS:
        refused = None
        try:
            parse(read_object(json.dumps(body).encode()))
        except (ApiError, DataError) as error:
            refused = error
        assert refused is None or (str(refused) and getattr(refused, "status", 400) == 400)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    models = save_models(tmp_path_factory.mktemp("models"))
    with Running(config_for(models, tmp_path_factory.mktemp("data"), open=True, max_new_tokens=3)) as running:
        yield running


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        [
            "/v1/chat/completions",
            "/v1/feedback",
            "/admin/versions",
            "/admin/rollback",
            "/admin/versions/base/metrics",
            "/admin/versions/base/promote",
        ]
    ),
    BODIES,
)
def test_the_service_never_fails(running: Running, path: str, body: dict):
    reply = httpx.post(running.url + path, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=30)
    assert reply.status_code < 500, reply.text
    assert reply.status_code < 400 or reply.json()["error"]["message"]


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(running: Running):
    schemathesis = pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed: the description is unproven against the service"
    )
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    statuses: dict[int, int] = {}

    def _conformance():
        from schemathesis.specs.openapi import checks

        return [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]

    for operation in schema.get_all_operations():
        operation = operation.ok()
        case_strategy = operation.as_strategy()

        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case_strategy)
        def one(case):
            reply = case.call(timeout=30)
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            case.validate_response(reply, checks=[schemathesis.checks.not_a_server_error, *_conformance()])

        one()
    assert statuses.get(200, 0) > 20 and sum(statuses.values()) > 500, statuses
