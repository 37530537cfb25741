"""A service that learns in its own process: on the weights that answer, with the result of a loop that has models of its own."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from service import HELLO, Running, config_for, save_models
from test_online_loop import TRAIN, talk_in, vote

from fastalign.errors import ConfigError
from fastalign.serve.loop.config import OnlineConfig
from fastalign.serve.loop.gate import GateConfig
from fastalign.serve.loop.loop import online
from fastalign.serve.loop.measure import MeasureConfig
from fastalign.serve.store import Store
from fastalign.train.config import from_mapping

LOOP: dict[str, Any] = {
    "min_feedback": 20, "poll": 0.05, "train": TRAIN, "collect": {"held_out": 0.3}, "measure": {"prompts": 4, "max_new_tokens": 8},
    "gate": {"min_comparisons": 1, "min_win_rate": 0.0, "max_kl": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def written(folder: Path, **changes: Any) -> str:
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump({**LOOP, **changes}))
    return str(path)


def ended(store: Store, name: str, seconds: float = 120) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [event.detail for event in store.events() if event.kind == "round" and event.detail["version"] == name]
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"{name} has not ended: {store.events()}")


def test_what_it_learns_is_what_a_loop_alone_learns_and_every_request_is_answered(models: Path, tmp_path: Path):
    talk = talk_in(models, tmp_path / "alone", users=8)
    vote(talk, 24, users=8)
    talk.store.close()
    shutil.copytree(tmp_path / "alone", tmp_path / "beside")
    config = from_mapping(LOOP | {"serve": str(tmp_path / "alone/feedback.db"), "rounds": 1, "wait": False}, OnlineConfig, "loop")
    assert isinstance(config.gate, GateConfig) and isinstance(config.measure, MeasureConfig)
    assert online(config) == 0

    said: dict[str, set[str]] = {}
    running = Running(config_for(models, tmp_path / "beside", open=True, loop=written(tmp_path)))
    with running, httpx.Client(base_url=running.url, timeout=60) as http:
        while "round-0001" not in said:
            reply = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0})
            assert reply.status_code == 200, reply.text
            said.setdefault(reply.json()["system_fingerprint"], set()).add(reply.json()["choices"][0]["message"]["content"])
        detail = ended(running.store, "round-0001")
        assert detail["promoted"] is True
        assert running.engine.models.weights.model().device.type  # the one model of the process
        figures = [Store(path / "feedback.db").version("round-0001").metrics for path in (tmp_path / "alone", tmp_path / "beside")]
        assert figures[0] == figures[1] and figures[0]["comparisons"] >= 1 and figures[0]["kl"] > 0
    assert set(said) == {"base", "round-0001"} and all(len(texts) == 1 for texts in said.values())  # each version always said the same
    digests = [
        hashlib.sha256((tmp_path / side / "online/round-0001/run/final/adapter_model.safetensors").read_bytes()).hexdigest()
        for side in ("alone", "beside")
    ]
    assert digests[0] == digests[1]


def test_a_service_that_stops_in_a_round_goes_on_with_it(models: Path, tmp_path: Path):
    talk = talk_in(models, tmp_path / "stopped", users=8)
    vote(talk, 24, users=8)
    talk.store.close()
    config = config_for(models, tmp_path / "stopped", open=True, loop=written(tmp_path, train={**TRAIN, "max_steps": 40}))
    folder = tmp_path / "stopped/online/round-0001"
    with Running(config):
        deadline = time.monotonic() + 60
        while not (folder / "run/checkpoints").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not (folder / "run/final").exists() and list((folder / "run/checkpoints").iterdir())
    with Running(config) as running:
        assert ended(running.store, "round-0001")["promoted"] is True
        assert running.engine.models.current.version == "round-0001"


def test_a_loop_that_fails_leaves_the_service(models: Path, tmp_path: Path):
    talk = talk_in(models, tmp_path / "failing")
    talk.store.close()
    gone = written(tmp_path, measure={"regression": str(tmp_path / "texts.jsonl"), "prompts": 4})
    (tmp_path / "texts.jsonl").write_text('{"nothing": "here"}\n')
    with Running(config_for(models, tmp_path / "failing", open=True, loop=gone)) as running:
        deadline = time.monotonic() + 60
        while not (told := [e for e in running.store.events() if e.kind == "loop stopped"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "texts.jsonl" in told[0].detail["reason"]
        with httpx.Client(base_url=running.url, timeout=60) as http:
            assert http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 4}).status_code == 200


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rounds": 2}, "rounds is for fastalign online"),
        ({"serve": "x.db"}, "serve is for fastalign online"),
        ({"reward_model": True}, "in a process of its own"),
        ({"dtype": "bfloat16"}, "dtype and device are those of the service"),
        ({"train": {"output": "x"}}, "train: output is for the loop to decide"),
        ({"min_feedbak": 2}, "did you mean min_feedback"),
    ],
)
def test_options_that_it_cannot_have(models: Path, tmp_path: Path, changes: dict, told: str):
    from fastalign.serve.service import build

    talk_in(models, tmp_path / "data").store.close()
    with pytest.raises(ConfigError, match=told):
        build(config_for(models, tmp_path / "data", open=True, loop=written(tmp_path, **changes)))


def test_options_that_count_only_with_a_loop(models: Path, tmp_path: Path):
    for options in ({"memory_budget": 2.0}, {"patience": 0.0}):
        with pytest.raises(ConfigError, match="set --loop"):
            config_for(models, tmp_path, open=True, **options).validate()
