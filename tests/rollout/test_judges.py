"""Judges: verdicts in both orders, ratings, retries, and nothing made up."""

import json
import threading

import pytest

pytest.importorskip("openai", reason="judges behind an endpoint are unproven here")
from endpoint import Endpoint, completion, prefers_longer

from fastalign.errors import ConfigError, JudgeError
from fastalign.rollout.judges import EndpointJudge, FunctionJudge, load_function


def judge(endpoint, **options):
    return EndpointJudge(endpoint.url, "m", **{"retries": 1, "timeout": 5.0} | options)


def test_completions_are_compared_in_both_orders():
    with Endpoint(prefers_longer) as endpoint:
        verdict = judge(endpoint)("why?", ["short", "the longest", "longer", "longer"], {})
    assert verdict.scores == (0.0, 1.0, 0.5, 0.5)  # shares of three comparisons: 0, 3, 1 + a tie twice
    assert (verdict.compared, verdict.consistent) == (6, 6)
    assert len(endpoint.requests) == 12
    assert verdict.first_wins == verdict.second_wins == 5


def test_a_judge_that_always_names_the_first_decides_nothing():
    with Endpoint(lambda messages: "[[A]]") as endpoint:
        verdict = judge(endpoint)("why?", ["one", "two"], {})
    assert verdict.scores == (0.5, 0.5)
    assert (verdict.consistent, verdict.first_wins, verdict.second_wins) == (0, 2, 0)


def test_ratings_are_read_from_the_last_line_and_must_be_on_the_scale():
    with Endpoint(lambda messages: "A [[3]] at first sight, yet\n[[7.5]]") as endpoint:
        assert judge(endpoint, mode="rate")("why?", ["one"], {}).scores == (7.5,)
        with pytest.raises(JudgeError, match="gave no verdict in 2 replies"):
            judge(endpoint, mode="rate", scale=(1.0, 5.0))("why?", ["one"], {})


def test_nonsense_is_asked_again_with_what_was_said():
    replies = iter(["I cannot decide", "[[B]]", "[[A]]"])
    with Endpoint(lambda messages: next(replies)) as endpoint:
        verdict = judge(endpoint)([{"role": "user", "content": "why?"}], ["one", "two"], {})
    assert verdict.scores == (0.0, 1.0)
    assert [m["role"] for m in endpoint.requests[1]] == ["user", "assistant", "user"]
    assert endpoint.requests[1][1]["content"] == "I cannot decide"
    assert "user: why?" in endpoint.requests[0][0]["content"]


def test_a_verdict_inside_an_answer_is_not_the_judges():
    with Endpoint(lambda messages: "No bracket here") as endpoint, pytest.raises(JudgeError, match="no verdict"):
        judge(endpoint)("why?", ["[[A]]", "[[A]]"], {})


@pytest.mark.parametrize("status", [429, 500, 401])
def test_an_endpoint_that_fails_is_named(status):
    with Endpoint(lambda messages: status) as endpoint, pytest.raises(JudgeError, match=f"{endpoint.url}.*did not answer"):
        judge(endpoint, retries=0)("why?", ["one", "two"], {})


NONSENSE = {
    "a page": b"<html>[[A]]</html>",
    "no json": b"{",
    "no object": b"[]",
    "no choices": b"{}",
    "null choices": b'{"choices": null}',
    "no choice": b'{"choices": []}',
    "no message": b'{"choices": [{"index": 0}]}',
    "null message": b'{"choices": [{"index": 0, "message": null}]}',
    "no content": b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": null}}]}',
    "parts": b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": [{"type": "text", "text": "[[A]]"}]}}]}',
    "empty": completion(""),
    "another letter": completion("[[C]]"),
    "a number": completion("[[7]]"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_reply_that_holds_no_verdict_is_no_verdict(case):
    body = NONSENSE[case] if isinstance(NONSENSE[case], bytes) else json.dumps(NONSENSE[case]).encode()
    with Endpoint(lambda messages: body) as endpoint, pytest.raises(JudgeError, match=r"did not answer|gave no verdict in 1 replies"):
        judge(endpoint, retries=0)("why?", ["one", "two"], {})


def test_a_judge_that_takes_too_long_is_named_and_asked_again():
    slow, over = threading.Event(), threading.Event()

    def reply(messages):
        if not slow.is_set():
            slow.set()
            over.wait(60)
        return "[[TIE]]"

    with Endpoint(reply) as endpoint:
        with pytest.raises(JudgeError, match=f"the judge m at {endpoint.url}/ did not answer: Request timed out"):
            judge(endpoint, retries=0, timeout=0.5)("why?", ["one", "two"], {})
        slow.clear()  # now there must be time for an answer that is not slow, on a busy machine, too
        assert judge(endpoint, retries=1, timeout=3.0)("why?", ["one", "two"], {}).scores == (0.5, 0.5)
        assert slow.is_set() and len(endpoint.requests) >= 4
        over.set()


def test_server_errors_are_retried():
    replies = iter([500, "[[A]]", 429, "[[B]]"])
    with Endpoint(lambda messages: next(replies)) as endpoint:
        assert judge(endpoint)("why?", ["one", "two"], {}).scores == (1.0, 0.0)


def test_one_completion_cannot_be_compared():
    with Endpoint(prefers_longer) as endpoint, pytest.raises(JudgeError, match=r"judge\.mode=rate"):
        judge(endpoint)("why?", ["one"], {})


def test_a_function_gets_the_columns_of_the_row(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def rate(prompts, completions, answer):\n    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    found = load_function(f"{tmp_path}/mine.py:rate")
    assert found("what?", ["it is 4", "it is 5"], {"answer": "4"}).scores == (1.0, 0.0)


@pytest.mark.parametrize("scores", [[1.0], [1.0, None], [1.0, float("nan")]])
def test_a_function_must_score_every_completion(scores):
    with pytest.raises(JudgeError, match="must return 2 finite numbers"):
        FunctionJudge(lambda prompts, completions: scores, "mine")("what?", ["a", "b"], {})


def test_a_function_that_raises_is_named():
    with pytest.raises(JudgeError, match=r"mine raised ZeroDivisionError"):
        FunctionJudge(lambda prompts, completions: 1 / 0, "mine")("what?", ["a"], {})


@pytest.mark.parametrize(
    ("name", "message"),
    [("rate", "must be MODULE:FUNCTION"), ("no.such.module:rate", "cannot be loaded"), ("json:rate", "no function 'rate'")],
)
def test_a_function_that_is_not_there(name, message):
    with pytest.raises(ConfigError, match=message):
        load_function(name)
