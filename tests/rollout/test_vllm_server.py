"""The engine on a vLLM server, against a stand-in that speaks the documented protocol: whole runs, and everything that goes wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from vllm_stand_in import StandIn

from fastalign import train
from fastalign.data.config import PromptDataConfig
from fastalign.errors import ConfigError, OutputError, RolloutError
from fastalign.models.config import LoraConfig, ModelConfig
from fastalign.models.load import load_model
from fastalign.objectives.grpo import GRPOConfig
from fastalign.objectives.online_dpo import OnlineDPOConfig
from fastalign.objectives.ppo import PPOConfig
from fastalign.objectives.rloo import RLOOConfig
from fastalign.rollout import vllm_server
from fastalign.rollout.engine import Sampling
from fastalign.rollout.vllm_server import VLLMServerConfig, VLLMServerEngine, check_server

REWARD = """
def likes_o(completions, **columns):
    return [c.count("o") / max(1, len(c)) + 0.01 * len(c) for c in completions]
"""
EOS = tiny_tokenizer().eos_token_id
PLAIN = Sampling(6, EOS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    tiny_model("qwen3").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("old river", "why?", "a green lamp", "stone")))
    (folder / "rewards.py").write_text(REWARD)
    return folder


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "PAUSE", 0.0)
    monkeypatch.setattr("fastalign.train.loop.write_report", lambda *_: None)


def config_of(place: Path, server: VLLMServerConfig, output: Path, kind: Any = GRPOConfig, **options: Any) -> Any:
    given = {
        "model": ModelConfig(path=str(place / "model"), dtype="float32"),
        "data": PromptDataConfig(path=str(place / "prompts.jsonl")),
        "lora": LoraConfig(r=4),
        "engine": "vllm_server",
        "vllm": server,
        "rewards": [f"{place}/rewards.py:likes_o"],
        "output": str(output),
        "batch_size": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_tokens": 64,
        "learning_rate": 3e-2,
        "lr_schedule": "constant",
        "max_steps": 3,
        "seed": 10,
    }
    return kind(**given | options)


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "adapter_model.safetensors")


def engine_of(place: Path, folder: Path, **options: Any) -> VLLMServerEngine:
    """With an adapter that changes something."""
    torch.manual_seed(1)
    model = load_model(ModelConfig(path=str(place / "model"), dtype="float32"), lora=LoraConfig(r=4))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.3 * torch.randn_like(weight))
    return VLLMServerEngine(model, VLLMServerConfig(retries=2, **options), output=folder)


# Whole runs


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}], ids=["plain", "tempered"])
def test_a_run_samples_by_the_weights_it_trains(place: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The trainer's log-probs are the server's at every step, while the weights move: each version of the adapter was the right one."""
    with StandIn(place / "model") as server:
        config = config_of(place, VLLMServerConfig(url=server.url), tmp_path / "run", **options)
        assert config.correction == "sequence_mask"
        train(config)
    rows = [row for row in logged(tmp_path / "run") if "loss" in row]
    assert len(rows) == 3
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert all(row["sampling/importance_sampling_ratio/min"] > 0.999 for row in rows)
    versions = [int(name.rsplit("-", 1)[1]) for name in server.loads]
    assert versions == list(range(1, len(versions) + 1)) and len(versions) >= 3, "each has a name of its own"
    assert len(server.adapters) == server.most == 1, "older ones are unloaded, and first"
    assert [path.name for path in (tmp_path / "run" / "adapters").iterdir()] == list(server.adapters), "and deleted"
    assert any(float(value.abs().max()) > 0 for name, value in adapter_of(tmp_path / "run").items() if "lora_B" in name)


def test_the_measure_finds_an_old_adapter(place: Path, tmp_path: Path) -> None:
    """A server that goes on answering by the first adapter: what the test above measures is then far from 0."""
    with StandIn(place / "model", stale=True) as server:
        train(config_of(place, VLLMServerConfig(url=server.url), tmp_path / "run"))
    rows = [row for row in logged(tmp_path / "run") if "loss" in row]
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4 < 1e-2 < rows[-1]["sampling/sampling_logp_difference/max"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RLOOConfig, {"beta": 0.05, "top_p": 0.9}),
        (OnlineDPOConfig, {}),
        (PPOConfig, {"num_iterations": 1}),
        (PPOConfig, {"num_iterations": 1, "critic": "adapter"}),
    ],
    ids=["rloo", "online_dpo", "ppo", "ppo with a critic's adapter"],
)
def test_the_other_algorithms(place: Path, tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    """The adapter that is sent is the policy's as it is now: it ends as `final` begins its next step."""
    with StandIn(place / "model") as server:
        train(config_of(place, VLLMServerConfig(url=server.url), tmp_path / "run", kind, max_steps=2, **options))
        assert len(server.loads) == 2 and {name for name, _ in server.requests} >= {"completions", "unload_lora_adapter"}
    (sent,) = (tmp_path / "run" / "adapters").iterdir()
    before, final = load_file(sent / "adapter_model.safetensors"), adapter_of(tmp_path / "run")
    assert before.keys() == final.keys() and not any("reference" in name or "critic" in name for name in before)
    moved = max(float((before[name] - final[name]).abs().max()) for name in final)
    assert 0 < moved < 0.1
    assert any(float(value.abs().max()) > 0 for name, value in before.items() if "lora_B" in name)


def test_a_run_goes_on_after_its_server_failed(place: Path, tmp_path: Path) -> None:
    """It fails for ever at the third generation; another server at another address takes over, and the end is that of a whole run."""
    with StandIn(place / "model") as server:
        train(config_of(place, VLLMServerConfig(url=server.url), tmp_path / "whole", max_steps=4, save_every=1))
    with StandIn(place / "model") as server:
        server.trouble = lambda path, before: 500 if path == "completions" and before >= 16 else None
        with pytest.raises(RolloutError, match=rf"{server.url}/completions: HTTP 500: as the test wants it, after 2 attempts.*--resume"):
            train(config_of(place, VLLMServerConfig(url=server.url, retries=1), tmp_path / "run", max_steps=4, save_every=1))
    (left,), before = [path.name for path in (tmp_path / "run" / "adapters").iterdir()], server.loads
    with StandIn(place / "model") as server:
        config = config_of(place, VLLMServerConfig(url=server.url, workers=3), tmp_path / "run", max_steps=4, save_every=1, resume=True)
        train(config)
        assert len(server.loads) == 2
        assert not set(before) & set(server.loads), "a name never comes back with other weights"
        assert next(body["lora_name"] for path, body in server.requests if path == "unload_lora_adapter") == left
    ours, theirs = adapter_of(tmp_path / "run"), adapter_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_an_overwritten_run_left_in_the_server_is_unloaded(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        for overwrite in (False, True):
            train(config_of(place, VLLMServerConfig(url=server.url), tmp_path / "run", max_steps=1, overwrite=overwrite))
        assert len(server.loads) == 2 and list(server.adapters) == server.loads[1:] and server.most == 1
        train(config_of(place, VLLMServerConfig(url=server.url), tmp_path / "other", max_steps=1))
        assert list(server.adapters) == server.loads[1:], "another run's are let alone"


# The engine


def test_answers_depend_on_the_seed_and_the_place(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model", model_eos=int(EOS) + 1) as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        prompts = [[5, 9, 30]] * 6
        first, again, other = (engine.generate(prompts, Sampling(8, EOS), seed=seed) for seed in ((3, 1), (3, 1), (3, 2)))
        part = engine.generate(prompts[:2], Sampling(8, EOS), seed=(3, 1))
        bodies = [body for path, body in server.requests if path == "completions"]
    assert first == again and part == first[:2] and first != other
    assert len({completion.tokens for completion in first}) > 1
    assert all(0 <= body["seed"] < 2**63 and body["ignore_eos"] and body["stop_token_ids"] == [EOS] for body in bodies)
    assert len({body["seed"] for body in bodies}) == 12


def test_the_end_is_kept_and_finishes(place: Path, tmp_path: Path) -> None:
    """With only the most probable token to draw: its log-prob is 0, and what that token is the stop token."""
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        (found,) = engine.generate([[5, 9]], Sampling(4, EOS, top_k=1), seed=(0,))
        (ended,) = engine.generate([[5, 9]], Sampling(4, found.tokens[0], top_k=1), seed=(0,))
    assert len(found.tokens) == 4 and not found.finished and found.logps == pytest.approx((0.0,) * 4, abs=1e-6)
    assert ended.tokens == found.tokens[:1] and ended.finished and len(ended.logps) == 1


def test_every_option_of_sampling_is_sent_and_those_of_the_server_are_not_used(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        engine.generate([[5, 9]], Sampling(7, EOS, temperature=0.8, top_k=11, top_p=0.9, min_p=0.05), seed=(0,))
        body = server.requests[-1][1]
    wanted = {"temperature": 0.8, "top_k": 11, "top_p": 0.9, "min_p": 0.05, "max_tokens": 7, "prompt": [5, 9]}
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert body == body | wanted | neutral


@pytest.mark.parametrize("sampling", [Sampling(6, EOS, temperature=0.5), Sampling(6, EOS, top_p=0.9)])
def test_a_server_whose_log_probs_are_raw_is_found_out(place: Path, tmp_path: Path, sampling: Sampling) -> None:
    with StandIn(place / "model", raw=True) as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        assert engine.generate([[5, 9]], PLAIN, seed=(0,)), "at temperature 1 they are the same"
        with pytest.raises(RolloutError, match="start the server with --logprobs-mode processed_logprobs"):
            engine.generate([[5, 9]], sampling, seed=(0,))


def test_a_failure_that_passes_is_none(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        calm = engine.generate([[5, 9]], PLAIN, seed=(0,))
        start = len(server.requests)
        server.trouble = lambda path, before: {1: 500, 2: 429}.get(before) if path == "completions" else None
        assert engine.generate([[5, 9]], PLAIN, seed=(0,)) == calm
        assert len(server.requests) - start == 3
        server.trouble = lambda path, before: 503 if path == "load_lora_adapter" and before == 1 else None
        engine.sync()
        assert len(server.loads) == 2


def test_a_load_whose_reply_was_lost_has_happened(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        load, replies = server.do_load_lora_adapter, iter([502])

        def lossy(body: dict[str, Any]) -> Any:
            done = load(body)
            return next(replies, done[0]), done[1]

        server.do_load_lora_adapter = lossy  # type: ignore[method-assign]
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        assert [path for path, _ in server.requests].count("load_lora_adapter") == 2 and len(server.loads) == 1
        assert engine.generate([[5, 9]], PLAIN, seed=(0,))


WRONG = {
    "no tokens": (lambda c: c.update(token_ids=None), "without token_ids; vLLM 0.10.2 or later"),
    "no log-probs": (lambda c: c.update(logprobs=None), "log-probs: none"),
    "too few log-probs": (lambda c: c["logprobs"]["token_logprobs"].pop(), "6 tokens with log-probs: 5"),
    "no number": (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None), "one that is no number"),
    "too short": (lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop()), "answer of 5 tokens .* --max-model-len"),
    "an end in its middle": (lambda c: c["token_ids"].__setitem__(2, 10**6), "answer of 6 tokens .* no stop tokens of its own"),
    "another prompt": (lambda c: c.update(prompt_token_ids=[5]), "neither cut nor change"),
    "another shape": (lambda c: c.update(logprobs=[1]), "none of /v1/completions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_reply_that_is_not_what_was_asked_for(place: Path, tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        server.change = change  # type: ignore[assignment]
        with pytest.raises(RolloutError, match=f"{server.url}/completions: .*{message}.*--resume"):
            engine.generate([[5, 9, 12]], Sampling(6, 10**6), seed=(0,))  # an end that never comes


def test_answers_of_another_model_and_no_json(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url)
        engine.sync()
        server.trouble = lambda path, before: b'{"model": "base", "choices": [{}]}'
        with pytest.raises(RolloutError, match="answered by 'base', not by the adapter"):
            engine.generate([[5, 9]], PLAIN, seed=(0,))
        server.trouble = lambda path, before: b"<html>"
        with pytest.raises(RolloutError, match="not JSON but b'<html>'"):
            engine.generate([[5, 9]], PLAIN, seed=(0,))


def test_a_server_that_is_late_or_was_started_anew(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url, timeout=0.2)
        engine.server.config.timeout = 60.0
        engine.sync()
        engine.server.config.timeout = 0.2
        server.trouble = lambda path, before: 60.0  # in a thread that nobody waits for
        with pytest.raises(RolloutError, match=r"no answer within 0.2 s, after 3 attempts; raise --vllm.timeout"):
            engine.generate([[5, 9]], PLAIN, seed=(0,))
        server.trouble, engine.server.config.timeout = (lambda path, before: None), 60.0
        server.adapters.clear()
        with pytest.raises(RolloutError, match=r"does not exist.*lost the adapter.*--resume"):
            engine.generate([[5, 9]], PLAIN, seed=(0,))


def test_a_server_that_takes_no_adapters(place: Path, tmp_path: Path) -> None:
    with StandIn(place / "model") as server:
        engine = engine_of(place, tmp_path, url=server.url)
        server.trouble = lambda path, before: 404 if path == "load_lora_adapter" else None
        with pytest.raises(RolloutError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"):
            engine.sync()
        server.trouble = lambda path, before: 400 if path == "load_lora_adapter" else None
        with pytest.raises(RolloutError, match=r"let it read .*--max-lora-rank of at least lora\.r"):
            engine.sync()
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write the weights"):
            engine_of(place, tmp_path, url=server.url, adapter_folder=str(tmp_path / "file" / "no")).sync()


def test_a_server_that_is_not_there_or_serves_something_else(place: Path, tmp_path: Path) -> None:
    """Known before anything is written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RolloutError, match=rf"{url}/models: cannot be reached .*, after 2 attempts; start the server, or set --vllm.url"):
        train(config_of(place, VLLMServerConfig(url=url, retries=1), tmp_path / "run"))
    with StandIn(place / "model") as server:
        with pytest.raises(RolloutError, match=rf"{server.url}: serves no model 'other' but .*model; set --vllm.model"):
            train(config_of(place, VLLMServerConfig(url=server.url, model="other"), tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        check_server(VLLMServerConfig(url=server.url, model=str(place / "model")), "whatever")
        server.trouble = lambda path, before: 401
        with pytest.raises(RolloutError, match=r"HTTP 401.*VLLM_API_KEY"):
            check_server(VLLMServerConfig(url=server.url), "whatever")


# The options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoraConfig()}, r"all weights are trained \(lora.r 0\); set --lora.r 16, or --engine vllm"),
        ({"lora": LoraConfig(r=4, modules_to_save=["lm_head"])}, "lora.modules_to_save"),
        ({"generation_tokens": 100}, "generation_tokens"),
        ({"engine": "transformers"}, "set --engine vllm_server"),
        ({"engine": "sglang"}, "engine must be one of"),
        ({"vllm": VLLMServerConfig(url="localhost:8000")}, "vllm.url must begin with http"),
        ({"vllm": VLLMServerConfig(timeout=0)}, "vllm.timeout must be positive"),
        ({"importance_sampling_correction": "none", "importance_sampling_clip_max": 2.0}, "importance_sampling_clip_max"),
    ],
)
def test_options_that_cannot_be_honoured(place: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(place, VLLMServerConfig(url="http://h:1/v1"), tmp_path, **options).validate()


def test_what_auto_weighs(place: Path, tmp_path: Path) -> None:
    server = VLLMServerConfig(url="http://h:1/v1")
    found = {
        name: config_of(place, server, tmp_path, **options).correction
        for name, options in {"plain": {}, "top_p": {"top_p": 0.9}, "vespo": {"loss_type": "vespo"}}.items()
    }
    assert found == {"plain": "sequence_mask", "top_p": "token_truncate", "vespo": "token_truncate"}
    config_of(place, server, tmp_path, loss_type="vespo").validate()
    assert GRPOConfig().correction == "none"
