"""The service over HTTP: OpenAI's own client, feedback, versions, and the status of everything that can be wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import sqlite3
import threading
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import openai
import pytest
from service import HELLO, Running, config_for, save_models

from fastalign.errors import ModelError
from fastalign.rollout.generate import generate
from fastalign.serve.chat import _Post
from fastalign.serve.guard import Guard
from fastalign.serve.records import Feedback
from fastalign.serve.service import writing_aside
from fastalign.serve.store import Store
from fastalign.serve.wire import ApiError, read_object

INJECTIONS = [
    "'; DROP TABLE answers; --",
    '" OR ""="',
    "../../../etc/passwd",
    "..%2f..%2fetc",
    "%00",
    "\x00",
    "a\nb: c",
    "<script>",
    "x" * 129,
    "名",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def running(models: Path, tmp_path_factory):
    with Running(config_for(models, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture(scope="module")
def secrets(running: Running) -> dict[str, str]:
    return {role: running.store.add_token(role)[1] for role in ("user", "operator")}


@pytest.fixture(scope="module")
def http(running: Running, secrets):
    with httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {secrets['operator']}"}, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(running: Running, secrets):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=secrets["user"], max_retries=0) as client:
        yield client


def ask(http: httpx.Client, **changes) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, **changes}
    return http.post("/v1/chat/completions", json={key: value for key, value in body.items() if value is not ...})


def test_openai_client_gets_answers_that_are_kept_with_all_that_learning_needs(client: openai.OpenAI, running: Running):
    done = client.chat.completions.create(model="tiny", messages=HELLO, n=3, max_tokens=9, seed=5, temperature=0.9, top_p=0.95, user="ann")
    tokenizer = running.engine.models.tokenizer
    prompt = tokenizer(tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
    sampling = {"max_new_tokens": 9, "eos_token_id": sorted(running.engine.models.eos), "temperature": 0.9, "top_p": 0.95, "seed": 5}
    expected = running.engine._between_answers(lambda: generate(running.engine.models.base, [prompt] * 3, **sampling))
    kept = list(running.store.answers(response=done.id))
    assert [a.id for a in kept] == [f"{done.id}-{i}" for i in range(3)] == [choice.answer_id for choice in done.choices]
    for choice, answer, drawn in zip(done.choices, kept, expected):
        assert answer.tokens == drawn.tokens and answer.prompt_ids == tuple(prompt) and answer.messages == HELLO
        assert answer.logps == pytest.approx(drawn.logps, abs=1e-4)
        assert choice.message.content == answer.text == tokenizer.decode(drawn.tokens, skip_special_tokens=True)
        assert choice.finish_reason == answer.finish_reason == ("stop" if drawn.finished else "length")
        assert answer.version == done.system_fingerprint == "base" and answer.sampling["seed"] == 5
    assert done.usage.prompt_tokens == len(prompt) and done.usage.completion_tokens == sum(len(d.tokens) for d in expected)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert len({a.user for a in kept}) == 1 and "ann" not in kept[0].user
    assert client.models.list().data[0].id == "tiny" == client.models.retrieve("tiny").id


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, running: Running):
    options = {"model": "tiny", "messages": HELLO, "n": 2, "max_tokens": 12, "seed": 11, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices and {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == choice.finish_reason and len(parts) > 6
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        logprobs = [token for part in parts if part.logprobs for token in part.logprobs.content]
        assert len(logprobs) == len(choice.logprobs.content) > 6
        for one, other in zip(logprobs, choice.logprobs.content):
            assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=1e-4) and len(one.top_logprobs) == 2
        assert running.store.answer(parts[0].answer_id).text == choice.message.content
    plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
    assert plain.choices[0].answer_id == plain.id and plain.choices[0].logprobs is None


def test_a_reply_says_what_its_time_went_into(http: httpx.Client, running: Running):
    hold, held = threading.Event(), threading.Event()
    order = threading.Thread(target=lambda: running.engine._between_answers(lambda: (held.set(), hold.wait(20))))
    order.start()
    held.wait(20)

    def release() -> None:
        while not running.engine.waiting:
            time.sleep(0.005)
        time.sleep(0.15)
        hold.set()

    threading.Thread(target=release).start()
    began = time.perf_counter()
    reply = ask(http, n=2)
    took = (time.perf_counter() - began) * 1000
    order.join()
    parts = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", reply.headers["server-timing"])}
    assert list(parts) == ["queue", "generate", "store"] and all(parts.values()) and sum(parts.values()) < took
    assert 100 < parts["queue"] < took


def test_what_the_engine_says_arrives_in_order_and_whole(monkeypatch):
    """Also what is sent while the loop is busy, or just as it delivers: several threads send, and none of it stays behind."""

    async def run() -> int:
        loop, calls = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(1), call(*args)))
        post, queues = _Post(loop), [asyncio.Queue() for _ in range(4)]
        for i in range(50):
            post.send(queues[0].put_nowait, [i])
        assert len(calls) == 1  # the loop has not run since
        threads = [threading.Thread(target=lambda q=q: [post.send(q.put_nowait, [i]) for i in range(50, 2000)]) for q in queues]
        for thread in threads:
            thread.start()
        heard = [[(await asyncio.wait_for(q.get(), 20))[0] for _ in range(2000 - (q is not queues[0]) * 50)] for q in queues]
        for thread in threads:
            thread.join()
        assert heard == [list(range(2000)), *[list(range(50, 2000))] * 3] and all(q.empty() for q in queues)
        return len(calls)

    assert asyncio.run(run()) < 7850


def test_an_answer_ends_before_a_stop_text_and_at_the_limit(client: openai.OpenAI, running: Running):
    free = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=24, temperature=0).choices[0].message.content
    stop = free[5:7]
    for stream in (False, True):
        asked = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=24, temperature=0, stop=["zzz", stop], stream=stream
        )
        if stream:
            parts = [chunk.choices[0] for chunk in asked]
            text, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
        else:
            text, reason = asked.choices[0].message.content, asked.choices[0].finish_reason
        assert (text, reason) == (free[: free.index(stop)], "stop")
        kept = list(running.store.answers())[-1]
        assert (kept.text, kept.finish_reason, kept.stopped) == (text, "stop", True)  # nothing that the model itself ended


def test_feedback_of_every_kind_is_kept_and_the_last_one_counts(http: httpx.Client, running: Running):
    first = ask(http, n=2).json()
    one, two = (choice["answer_id"] for choice in first["choices"])
    sent = [
        {"answer": one, "thumb": "up", "reason": "kind", "user": "ann"},
        {"answer": one, "thumb": "down", "user": "ann"},
        {"answer": one, "thumb": "up", "user": "bob"},
        {"answer": one, "rating": 4},
        {"answer": two, "chosen_over": [one]},
        {"answer": two, "edit": "what it should say"},
    ]
    before = max((f.id for f in running.store.feedback()), default=0)
    replies = [http.post("/v1/feedback", json=body) for body in sent]
    assert [reply.status_code for reply in replies] == [200] * 6
    kept = [(f.kind, f.value, f.reason) for f in running.store.feedback(after=before)]
    assert kept == [
        ("thumb", False, None),
        ("thumb", True, None),
        ("rating", 4, None),
        ("choice", (one,), None),
        ("edit", sent[5]["edit"], None),
    ]
    assert [f.id for f in running.store.history(one)] == [reply.json()["id"] for reply in replies[:4]]
    assert running.store.history(one)[0].reason == "kind"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": ...}, "model is missing"),
        ({"model": 3}, "model must be text, got a number"),
        ({"messages": ...}, "messages must be a list of 1 to 1024"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [3]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "boss", "content": "x"}]}, r"messages\[0\].role must be one of system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be text, got null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "parts"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls is not supported"),
        ({"n": 0}, "n must be a whole number from 1 to 16"),
        ({"n": True}, "n must be a whole number"),
        ({"temperature": 2.1}, "temperature must be a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": -0.1}, "top_p must be a number from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"max_completion_tokens": 9}, "max_tokens and max_completion_tokens differ"),
        ({"stop": ["a"] * 5}, "stop must be a text or up to 4"),
        ({"stop": ""}, "stop must be a text"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"seed": 10**400}, "seed must be a whole number"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
        ({"logprobs": 5}, "logprobs must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options must be an object"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported here"),
        ({"tools": [{"type": "function"}]}, "tools is not supported here"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported here"),
        ({"temprature": 1}, "unknown parameter 'temprature'"),
        ({"user": "x" * 257}, "at most 256"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "window is 512 tokens"),
        ({"max_tokens": 506}, r"has 7 and 506 for the answer: shorten it"),
    ],
)
def test_what_cannot_be_answered_is_a_400_in_openais_shape(http: httpx.Client, changes: dict, told: str):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, **changes}
    data = json.dumps({key: value for key, value in body.items() if value is not ...})
    reply = http.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert re.search(told, error["message"]), error["message"]


def test_what_asks_for_nothing_special_is_accepted(http: httpx.Client):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "response_format": {"type": "text"},
        "seed": None,
    }
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    same = [ask(http, temperature=0, messages=messages, **neutral).json()["choices"][0]["message"] for messages in (HELLO, parts)]
    assert same[0] == same[1]
    assert ask(http, temperature=0, top_p=0, stop=None).json()["choices"][0]["message"] == same[0]
    assert ask(http, temperature=1, top_p=0).json()["choices"][0]["message"] == same[0]  # the most probable token alone
    assert ask(http, max_tokens=..., max_completion_tokens=4, temperature=0).json()["choices"][0]["message"] == same[0]
    assert ask(http, max_tokens=...).json()["usage"]["completion_tokens"] <= 24  # the service's own limit


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI, running: Running):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=9)
    with pytest.raises(openai.AuthenticationError, match="no valid token"):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong").chat.completions.create(model="tiny", messages=HELLO)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"thumb": "up"}, 400, "answer is missing"),
        ({"answer": "x"}, 400, "exactly one of thumb, chosen_over, rating and edit, got none"),
        ({"answer": "x", "thumb": "up", "rating": 1}, 400, "got thumb, rating"),
        ({"answer": "x", "thumb": "sideways"}, 400, "thumb must be"),
        ({"answer": "x", "rating": "5"}, 400, "rating must be a number"),
        ({"answer": "x", "rating": 1e300}, 400, "from -1e"),
        ({"answer": "x", "edit": " "}, 400, "an edit is the text"),
        ({"answer": "x", "edit": ["x"]}, 400, "edit must be text"),
        ({"answer": "x", "chosen_over": "y"}, 400, "must be a list"),
        ({"answer": "x", "chosen_over": []}, 400, "names the answers"),
        ({"answer": "x", "chosen_over": ["x"]}, 400, "named twice"),
        ({"answer": "x", "thumb": "up", "stars": 5}, 400, "unknown parameter 'stars'"),
        ({"answer": "x", "thumb": "up", "reason": "x" * 4001}, 400, "at most 4000"),
        ({"answer": "x", "thumb": "up"}, 404, "there is no answer 'x'"),
        ({"answer": "x", "chosen_over": ["y"]}, 404, "there is no answer 'x'"),
        *(({"answer": text, "thumb": "up", "reason": text[:100]}, 404, "no answer") for text in INJECTIONS if len(text) < 129),
        ({"answer": "x" * 129, "thumb": "up"}, 400, "at most 128"),
    ],
)
def test_feedback_that_cannot_be_kept(http: httpx.Client, body: dict, status: int, told: str):
    reply = http.post("/v1/feedback", json=body)
    assert reply.status_code == status and told in reply.json()["error"]["message"], reply.text


def test_what_is_written_is_text_and_never_sql_or_a_path(http: httpx.Client, running: Running):
    tables = "SELECT count(*) FROM sqlite_master"
    before = running.store.database.read(lambda c: c.execute(tables).fetchone()[0])
    texts = [text for text in INJECTIONS if len(text) < 129]
    for text in texts:
        answered = ask(http, user=text, messages=[{"role": "user", "content": text}])
        assert answered.status_code == 200
        one = answered.json()["id"]
        for body in ({"edit": text}, {"thumb": "up", "reason": text}):
            assert http.post("/v1/feedback", json={"answer": one, "user": text, **body}).status_code == 200
        edit, thumb = running.store.history(one)
        assert (edit.value, thumb.reason) == (text, text) and running.store.answer(one).messages[0]["content"] == text
        assert http.post("/v1/feedback", json={"answer": one, "chosen_over": [text]}).status_code == 404
        assert http.get(f"/v1/models/{quote(text, safe='')}").status_code == 404
        assert http.post("/admin/rollback", json={"to": text[:64], "reason": text}).status_code == 409
        assert http.post("/admin/versions/base/promote", json={"expected": text[:64]}).status_code == 200  # live already
        assert http.post("/admin/versions", json={"name": text[:64], "folder": "one"}).status_code == 400
        assert http.post("/admin/versions", json={"name": "v", "folder": text}).status_code in (400, 403)
        assert http.post("/admin/versions", json={"name": "v", "folder": "one", "parent": text[:64]}).status_code == 404
        assert http.post(f"/admin/versions/{quote(text, safe='')}/metrics", json={"metrics": {text: text}}).status_code in (404, 405)
    assert running.store.database.read(lambda c: c.execute(tables).fetchone()[0]) == before
    assert [version.name for version in running.store.versions()] == ["base"]


def test_a_link_that_leads_out_of_the_folder_of_versions_is_refused(models: Path, tmp_path: Path):
    (tmp_path / "versions").mkdir()
    shutil.copytree(models / "one", tmp_path / "versions" / "one")
    (tmp_path / "versions" / "out").symlink_to(models / "two")
    (tmp_path / "versions" / "up").symlink_to("..")
    (tmp_path / "versions" / "round").symlink_to("round")
    (tmp_path / "versions" / "in").symlink_to("one")
    config = config_for(models, tmp_path, open=True, versions=str(tmp_path / "versions"))
    with Running(config) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        for folder, status in (
            ("out", 403),
            ("up", 403),
            ("up/versions/one/../../..", 403),
            ("round", 400),
            ("x" * 300, 400),
            ("x/" * 2000, 400),
            ("one/../../versions/out", 403),
        ):
            assert http.post("/admin/versions", json={"name": "v", "folder": folder}).status_code == status, folder
        added = http.post("/admin/versions", json={"name": "v", "folder": "in"})
        assert added.status_code == 201 and added.json()["folder"] == str(tmp_path / "versions" / "one")  # where the link led then


def test_a_full_database_refuses_answers_and_the_service_lives(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path, open=True)) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        first = ask(http).json()["id"]
        running.store.database._writer.execute("PRAGMA max_page_count = 1")
        long = [{"role": "user", "content": "word " * 90}]
        replies = [ask(http, messages=long, max_tokens=1) for _ in range(20)]
        assert {reply.status_code for reply in replies} <= {200, 503} and replies[-1].status_code == 503
        assert replies[-1].json()["error"]["code"] == "store_unavailable" and replies[-1].headers["retry-after"]
        stream = ask(http, messages=long, max_tokens=1, stream=True)
        assert "store_unavailable" in stream.text and "[DONE]" not in stream.text
        assert http.get("/healthz").status_code == 200 and http.get("/admin/versions").status_code == 200  # reading goes on
        assert http.post("/admin/versions", json={"name": "one", "folder": "one", "metrics": {"note": "x" * 9000}}).status_code == 503
        running.store.database._writer.execute("PRAGMA max_page_count = 1000000")
        assert ask(http, messages=long, max_tokens=1).status_code == 200
        kept = [answer.id for answer in running.store.answers()]
        assert kept[0] == first and len(kept) == 2 + sum(reply.status_code == 200 for reply in replies)


def test_a_version_whose_folder_is_gone_is_not_gone_back_to(models: Path, tmp_path: Path):
    gone = shutil.copytree(models / "two", tmp_path / "gone")
    config = config_for(models, tmp_path, open=True)
    with Running(config) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        for name, folder in (("gone", gone), ("one", models / "one")):
            running.store.add_version(name, folder)
            assert http.post(f"/admin/versions/{name}/promote").status_code == 200
        said = ask(http, temperature=0).json()["choices"][0]["message"]
        shutil.rmtree(gone)
        refused = http.post("/admin/rollback", json={"to": "gone"})
        assert refused.status_code == 409 and "the folder is gone" in refused.json()["error"]["message"]
        assert running.store.live_version().name == "one" and running.store.version("gone").state == "retired"
        again = ask(http, temperature=0).json()
        assert (again["system_fingerprint"], again["choices"][0]["message"]) == ("one", said)
        running.store.roll_back("gone")
    with pytest.raises(ModelError, match=r"'gone' is live in .* but cannot be loaded: .*the folder is gone.*fastalign serve rollback"):
        Running(config)
    with Store(config.data) as store:  # as that command does
        assert store.roll_back().name == "base"
    with Running(config) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        assert ask(http).json()["system_fingerprint"] == "base"


def test_answers_to_different_conversations_cannot_be_compared(http: httpx.Client):
    one, two = (ask(http, messages=[{"role": "user", "content": text}]).json()["id"] for text in ("a", "b"))
    reply = http.post("/v1/feedback", json={"answer": one, "chosen_over": [two]})
    assert reply.status_code == 400 and "another conversation" in reply.text


def test_bodies_that_are_none(http: httpx.Client, running: Running):
    headers = {"content-type": "application/json"}
    bad = {b"": 400, b"{": 400, b"[]": 400, b"null": 400, b'{"a": NaN}': 400, b"\xff\xfe": 400, b'{"user": "\\ud800"}': 400}
    bad |= {b"[" * 100_000: 400, b'{"seed": ' + b"9" * 5000 + b"}": 400, b" " * 1_048_577: 413}
    for path in ("/v1/chat/completions", "/v1/feedback", "/admin/versions", "/admin/rollback"):
        for data, status in bad.items():
            assert http.post(path, content=data, headers=headers).status_code == status, (path, data[:20])
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            assert http.post(path, content=b"{}", headers={"content-type": kind}).status_code == 415

        def drip():
            for _ in range(40):
                yield b" " * 65536

        assert http.post(path, content=drip(), headers=headers).status_code == 413  # in chunks, without a declared length
    assert ask(http).status_code == 200
    with pytest.raises(ApiError, match="not valid JSON"):
        read_object(b"[1,")


def test_who_may_do_what(running: Running, secrets: dict[str, str], http: httpx.Client):
    everybody = ["/", "/operator", "/healthz", "/openapi.json", "/pages/style.css"]
    users = [("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/chat/completions"), ("POST", "/v1/feedback")]
    operators = [("GET", f"/admin/{name}") for name in ("versions", "feedback", "events")]
    operators += [
        ("POST", path) for path in ("/admin/versions", "/admin/versions/x/promote", "/admin/versions/x/metrics", "/admin/rollback")
    ]
    token, revoked = running.store.add_token("operator")
    running.store.revoke_token(token.id)
    wrong = [
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {secrets['operator']}",
        secrets["operator"],
        f"Bearer {revoked}",
        "Bearer \xff\xfe",
    ]
    with httpx.Client(base_url=running.url) as nobody:
        assert all(nobody.get(path).status_code == 200 for path in everybody)
        for method, path in [*users, *operators]:
            for header in wrong:
                reply = nobody.request(method, path, headers={"authorization": header.encode("latin-1")})
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", (path, header)
            user = nobody.request(method, path, headers={"authorization": f"Bearer {secrets['user']}"}, json={})
            assert (user.status_code == 403) == ((method, path) in operators) and user.status_code != 401
        for path in ("/nope", "/v1/", "/pages/../store.py", "/pages/%2e%2e/store.py", "/pages/chat.html/x", "/v1/models/"):
            assert nobody.get(path).status_code in (401, 404) and "error" in nobody.get(path).json()
        assert nobody.delete("/v1/feedback").status_code == 405
    for reply in (http.get("/v1/models"), http.get("/nope"), http.get("/")):
        assert reply.headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in reply.headers


def test_invented_users_behind_one_token_are_one_voice_unless_it_speaks_for_many(running: Running, http: httpx.Client):
    answer = ask(http).json()["id"]
    before = max((one.id for one in running.store.feedback()), default=0)
    tokens = [running.store.add_token("user", many_users=many)[1] for many in (False, False, True)]
    for token in tokens:
        for user in ("ann", "bob", None):
            body = {"answer": answer, "thumb": "up"} | ({"user": user} if user else {})
            assert http.post("/v1/feedback", json=body, headers={"authorization": f"Bearer {token}"}).status_code == 200
    found = list(running.store.feedback(after=before))
    voices = [one.voice for one in found]
    assert len({one.user for one in found}) == 9  # the last judgement of each counts, whoever speaks for them
    assert [len(set(voices[k : k + 3])) for k in (0, 3, 6)] == [1, 1, 3] and len(set(voices)) == 5
    assert all(one.voice == one.user for one in found[6:])


def test_a_foreign_origin_is_only_let_in_where_it_is_named(models: Path, tmp_path: Path):
    with (
        Running(config_for(models, tmp_path, open=True, cors=["https://chat.example"])) as running,
        httpx.Client(base_url=running.url) as http,
    ):
        for origin, allowed in (("https://chat.example", "https://chat.example"), ("https://evil.example", None)):
            asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
            assert http.options("/v1/feedback", headers=asked).headers.get("access-control-allow-origin") == allowed
            assert http.get("/v1/models", headers={"origin": origin}).headers.get("access-control-allow-origin") == allowed
        # An open service needs no token, and so neither answers pages elsewhere nor names that point here.
        assert http.get("/admin/versions").status_code == 200 and http.get("/healthz").json()["open"] is True
        for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://[", ""):
            sent = http.post("/admin/versions/base/promote", headers={"origin": origin})  # what a page may send without asking before
            assert sent.status_code == 403 and "--cors" in sent.json()["error"]["message"], origin
        for origin in ("https://chat.example", "http://localhost:3000", running.url):
            assert http.post("/admin/versions/base/promote", headers={"origin": origin}).status_code == 200, origin
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert http.get("/v1/models", headers={"host": host}).status_code in (400, 421), host
        for host in ("localhost", "127.0.0.1:99", "[::1]:80"):
            assert http.get("/v1/models", headers={"host": host}).status_code == 200, host
        assert http.post("/v1/feedback", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


def test_rates_and_running_requests_are_limited_for_each_token(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path, rate=6, concurrent=1)) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        keys = [{"authorization": f"Bearer {running.store.add_token('user')[1]}"} for _ in range(3)]
        replies = [http.get("/v1/models", headers=keys[0]) for _ in range(8)]
        assert [reply.status_code for reply in replies] == [200] * 6 + [429] * 2
        assert 1 <= int(replies[-1].headers["retry-after"]) <= 11 and replies[-1].json()["error"]["type"] == "rate_limit_error"
        hold, held = threading.Event(), threading.Event()
        order = threading.Thread(target=lambda: running.engine._between_answers(lambda: (held.set(), hold.wait(20))))
        first = threading.Thread(target=lambda: ask(httpx.Client(base_url=running.url, headers=keys[1], timeout=30), stream=True))
        order.start()
        held.wait(20)
        first.start()
        while not running.engine.waiting:
            time.sleep(0.01)
        second = http.get("/v1/models", headers=keys[1])
        assert second.status_code == 429 and second.headers["retry-after"] == "2" and "1 requests of this token" in second.text
        assert http.get("/v1/models", headers=keys[2]).status_code == 200
        hold.set()
        order.join()
        first.join()
        until = time.monotonic() + 20
        while (last := http.get("/v1/models", headers=keys[1])).status_code != 200 and time.monotonic() < until:
            time.sleep(0.01)  # a client hears the end of a stream a moment before the service has done with it
        assert last.status_code == 200  # and counts it no more


def test_the_rate_recovers_and_old_callers_are_forgotten(tmp_path: Path, models: Path, monkeypatch):
    now = [0.0]
    guard = Guard(None, config_for(models, tmp_path, rate=60), clock=lambda: now[0])  # type: ignore[arg-type]
    allowance = guard._allowance("a")
    allowance.tokens = 0.5
    now[0] = 2.0
    assert guard._allowance("a").tokens == 2.5
    now[0] = 1000.0
    assert guard._allowance("a").tokens == 60
    monkeypatch.setattr("fastalign.serve.guard.KEPT_CALLERS", 2)
    guard._allowances["busy"] = type(allowance)(0.0, 0.0, running=1)
    guard._allowance("b")
    guard._allowance("c")
    assert "busy" in guard._allowances and "a" not in guard._allowances


def test_a_client_that_leaves_frees_its_row(http: httpx.Client, running: Running, secrets: dict[str, str], monkeypatch):
    with running.engine.models.serving() as model:
        forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: (time.sleep(0.03), forward(*args, **kwargs))[1])  # 15 s for the answer
    running.engine.models.eos, kept = frozenset([319]), running.engine.models.eos
    try:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 480, "temperature": 2}
        before = len(list(running.store.answers()))
        for stream in (True, False):
            data = json.dumps({**body, "stream": stream}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secrets['user']}\r\n"
            head += "Content-Type: application/json\r\n"
            with socket.create_connection(running.listener.getsockname()) as raw:
                raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                deadline = time.time() + 20
                while not running.engine.running:
                    assert time.time() < deadline
                    time.sleep(0.005)
            began = time.time()
            while running.engine.running:
                assert time.time() < began + 10
                time.sleep(0.005)
        assert len(list(running.store.answers())) == before  # what nobody saw is not kept
    finally:
        running.engine.models.eos = kept
    assert ask(http).status_code == 200


def test_a_full_queue_is_a_503_that_says_when_to_come_back(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path, open=True, max_waiting=1)) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        hold, held = threading.Event(), threading.Event()
        order = threading.Thread(target=lambda: running.engine._between_answers(lambda: (held.set(), hold.wait(20))))
        order.start()
        held.wait(20)
        results: list[httpx.Response] = []
        first = threading.Thread(target=lambda: results.append(ask(httpx.Client(base_url=running.url, timeout=30))))
        first.start()
        while not running.engine.waiting:
            time.sleep(0.01)
        for stream in (True, False):
            second = ask(http, stream=stream)
            assert second.status_code == 503 and second.headers["retry-after"] and second.json()["error"]["code"] == "queue_full"
        hold.set()
        first.join()
        order.join()
        assert results[0].status_code == 200


def test_a_locked_or_full_database_is_a_503_and_nothing_is_acknowledged(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path, open=True, timeout=0.2)) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        answer = ask(http).json()["id"]
        blocker = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        whole, feedback = ask(http), http.post("/v1/feedback", json={"answer": answer, "thumb": "up"})
        promoted = http.post("/admin/versions", json={"name": "one", "folder": "one"})
        stream = ask(http, stream=True)
        assert [reply.status_code for reply in (whole, feedback, promoted, stream)] == [503, 503, 503, 200]
        assert feedback.headers["retry-after"] and str(tmp_path) not in feedback.text
        assert "store_unavailable" in stream.text and "[DONE]" not in stream.text and '"finish_reason": "length"' not in stream.text
        blocker.execute("ROLLBACK")
        blocker.close()
        assert http.post("/v1/feedback", json={"answer": answer, "thumb": "up"}).status_code == 200
        running.store.database._writer.execute("PRAGMA max_page_count = 1")
        full = [http.post("/v1/feedback", json={"answer": answer, "edit": "x" * 9000, "user": str(i)}) for i in range(4)]
        assert 503 in {reply.status_code for reply in full}
        kept = sum(reply.status_code == 200 for reply in full)
        running.store.database._writer.execute("PRAGMA max_page_count = 1000000")
        assert http.post("/v1/feedback", json={"answer": answer, "rating": 1}).status_code == 200
        assert len(running.store.history(answer)) == 2 + kept


def test_versions_are_added_promoted_and_rolled_back(models: Path, tmp_path: Path):
    config = config_for(models, tmp_path, open=True)
    greedy = {"temperature": 0, "max_tokens": 12}
    with Running(config) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        gone = shutil.copytree(models / "two", models / "gone")
        base = ask(http, **greedy).json()
        added = http.post("/admin/versions", json={"name": "v1", "folder": "one", "parent": "base", "metrics": {"win_rate": 0.6}})
        assert added.status_code == 201 and added.json()["state"] == "candidate" and added.json()["folder"] == str(models / "one")
        assert http.post("/admin/versions", json={"name": "v2", "folder": str(gone)}).status_code == 201
        assert http.post("/admin/versions/v1/promote").json()["state"] == "live" == http.post("/admin/versions/v1/promote").json()["state"]
        one = ask(http, **greedy).json()
        assert (base["system_fingerprint"], one["system_fingerprint"]) == ("base", "v1") and base["choices"][0]["message"] != one[
            "choices"
        ][0]["message"]
        shutil.rmtree(gone)
        refused = http.post("/admin/versions/v2/promote")
        assert refused.status_code == 409 and "the folder is gone" in refused.json()["error"]["message"]
        assert ask(http, **greedy).json()["choices"][0]["message"] == one["choices"][0]["message"]
        assert http.post("/admin/versions/v1/metrics", json={"metrics": {"n": 7}}).json()["metrics"] == {"win_rate": 0.6, "n": 7}
        assert http.post("/admin/rollback", json={"to": "v2"}).status_code == 409
        assert http.post("/admin/rollback", json={"to": "base", "reason": "worse"}).json()["name"] == "base"
        assert ask(http, **greedy).json()["choices"][0]["message"] == base["choices"][0]["message"]
        assert http.post("/admin/rollback", json={}).status_code == 409  # the base replaced nothing
        states = {row["name"]: (row["state"], row["answers"]) for row in http.get("/admin/versions").json()["data"]}
        assert states == {"base": ("live", 2), "v1": ("rolled_back", 2), "v2": ("candidate", 0)}
        assert {"refused", "promoted", "rolled back"} <= {event["kind"] for event in http.get("/admin/events").json()["data"]}
        http.post("/admin/versions/v1/promote")
        for body, status in [
            ({"name": "v1", "folder": "one"}, 409),
            ({"name": "../v3", "folder": "one"}, 400),
            ({"name": "v3"}, 400),
            ({"name": "v3", "folder": "/etc"}, 403),
            ({"name": "v3", "folder": "../../../../etc"}, 403),
            ({"name": "v3", "folder": "one\0"}, 400),
            ({"name": "v3", "folder": "nowhere"}, 400),
            ({"name": "v3", "folder": "one", "parent": "x"}, 404),
            ({"name": "v3", "folder": "one", "metrics": {"a": []}}, 400),
        ]:
            assert http.post("/admin/versions", json=body).status_code == status, body
        for name in INJECTIONS:
            assert http.post(f"/admin/versions/{quote(name, safe='')}/promote").status_code in (404, 405)
    with Running(config) as again, httpx.Client(base_url=again.url, timeout=30) as http:  # a new start serves the live version
        assert ask(http, **greedy).json()["choices"][0]["message"] == one["choices"][0]["message"]


def test_a_promotion_says_which_version_it_expects_to_replace(models: Path, tmp_path: Path, monkeypatch):
    with Running(config_for(models, tmp_path, open=True)) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        for name in ("one", "two"):
            running.store.add_version(name, models / name)
        path = "/admin/versions/{}/promote".format
        assert http.post(path("one"), json={"expected": "base"}).json()["replaced"] == "base"
        assert http.post(path("one"), json={"expected": "base"}).status_code == 200  # live already: nothing to replace
        assert http.post("/admin/rollback", json={"to": "base"}).status_code == 200
        monkeypatch.setattr(running.engine.models, "read", lambda folder: pytest.fail("read for nothing"))
        late = http.post(path("two"), json={"expected": "one"})
        assert late.status_code == 409 and "version 'base' is live by now, not 'one'" in late.json()["error"]["message"]
        monkeypatch.undo()

        def rolled_back_meanwhile(*args, read=running.engine.models.read):
            running.store.promote("one")
            return read(*args)

        monkeypatch.setattr(running.engine.models, "read", rolled_back_meanwhile)
        late = http.post(path("two"), json={"expected": "base"})
        assert late.status_code == 409 and running.engine.models.current.version == "base" and not running.engine.models.adapters()
        assert running.store.live_version().name == "one" and running.store.version("two").state == "candidate"
        monkeypatch.undo()
        assert http.post(path("two"), json={"expected": "one"}).json()["state"] == "live"
        bare = {"content-type": ""}
        for content, headers, status in [
            (b"", {}, 200),
            (b"", {"content-type": "application/json"}, 200),
            (b"{}", {"content-type": "application/json"}, 200),
            (b'{"expected": "two"}', bare, 415),
            (b'{"expected": "one"}', {"content-type": "text/plain"}, 415),
            (b'{"expected": 3}', {"content-type": "application/json"}, 400),
            (b'{"expects": "one"}', {"content-type": "application/json"}, 400),
            (b"[]", {"content-type": "application/json"}, 400),
        ]:
            reply = http.post(path("two"), content=content, headers=headers)
            assert reply.status_code == status, (content, headers, reply.text)


def test_stopping_finishes_the_answers_that_are_being_given(models: Path, tmp_path: Path):
    running = Running(config_for(models, tmp_path, open=True))
    lines: list[str] = []
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 100, "stream": True, "seed": 1, "temperature": 2}
    began = threading.Event()

    def listen() -> None:
        with httpx.Client(timeout=30) as http, http.stream("POST", f"{running.url}/v1/chat/completions", json=body) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                began.set()

    thread = threading.Thread(target=listen)
    thread.start()
    began.wait(20)
    running.stop()
    thread.join()
    assert lines[-2] == "data: [DONE]" and "finish_reason" in lines[-4]
    with pytest.raises(httpx.TransportError):
        httpx.get(running.url)


def test_prompts_stay_out_of_the_log_unless_asked_for(models: Path, tmp_path: Path, caplog):
    caplog.set_level("INFO", "fastalign")
    secret = [{"role": "user", "content": "my secret question"}]
    for wanted in (False, True):
        caplog.clear()
        with Running(config_for(models, tmp_path, open=True, log_prompts=wanted)) as running, httpx.Client(base_url=running.url) as http:
            answer = ask(http, messages=secret).json()["id"]
            http.post("/v1/feedback", json={"answer": answer, "edit": "my secret answer"})
            http.post("/v1/chat/completions", json={"model": "tiny", "messages": "my secret mistake"})
        assert ("secret question" in caplog.text) is wanted and "secret answer" not in caplog.text and "secret mistake" not in caplog.text
        assert "POST complete 200" in caplog.text and "POST complete 400" in caplog.text


def test_feedback_object_is_what_the_loop_reads(http: httpx.Client, running: Running):
    answer = ask(http).json()["id"]
    kept = http.post("/v1/feedback", json={"answer": answer, "rating": 2.5, "reason": INJECTIONS[0]}).json()
    [feedback] = running.store.history(answer)
    assert feedback == Feedback(answer, "rating", 2.5, feedback.user, INJECTIONS[0], feedback.created, kept["id"], feedback.voice)


def test_the_log_is_written_by_a_thread_of_its_own_in_order_and_to_its_end():
    logger, written, go = logging.getLogger("fastalign.of this test"), [], threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert go.wait(20)
            written.append((record.getMessage(), threading.current_thread() is threading.main_thread()))

    slow = Slow(level=logging.INFO)
    logger.addHandler(slow)
    logger.setLevel(logging.DEBUG)
    with writing_aside(logger):
        for i in range(100):
            logger.info("line %d", i)  # none of them waits
        logger.debug("unseen")
        assert written == []
        go.set()
    assert written == [(f"line {i}", False) for i in range(100)] and logger.handlers == [slow]
    logger.info("after")
    assert written[-1] == ("after", True)
    logger.removeHandler(slow)
    with writing_aside(logger):
        assert logger.handlers == []
