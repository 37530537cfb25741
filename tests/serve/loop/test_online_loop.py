"""The loop: what a round leaves behind, and that it is the same wherever the loop was killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from service import Running, config_for, save_models
from talk import Talk
from tiny import sentence

from fastalign.errors import ConfigError, NumericsError, OutputError
from fastalign.models.config import ModelConfig
from fastalign.serve.loop import loop as module
from fastalign.serve.loop import rounds as rounds_module
from fastalign.serve.loop.collect import CollectConfig
from fastalign.serve.loop.config import OnlineConfig
from fastalign.serve.loop.loop import Loop, OwnModels, online
from fastalign.serve.loop.switch import Database
from fastalign.serve.store import Store
from fastalign.train.folder import locked

ROOT = Path(__file__).parents[3]
GOOD = {"win_rate": 0.9, "win_rate_ci95": [0.85, 0.94], "win_by": "judge", "comparisons": 200, "kl": 0.01, "kl_parent": 0.01}
BAD = GOOD | {"win_rate": 0.3, "win_rate_ci95": [0.24, 0.37]}
TRAIN = {"lora.r": 4, "batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "save_every": 1}


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def talk(models: Path, tmp_path: Path):
    talk = talk_in(models, tmp_path)
    yield talk
    talk.store.close()


@pytest.fixture
def figures(monkeypatch) -> dict[str, Any]:
    """What the measurement of the moment finds; it is called with folders that are there."""
    found = dict(GOOD)

    def measure(models: Any, candidate: str, parent: str, first: str, *_: Any, **__: Any) -> dict[str, Any]:
        assert (Path(candidate) / "adapter_config.json").is_file() and Path(parent).is_dir() and models.tokenizer and Path(first).is_dir()
        return dict(found)

    monkeypatch.setattr(module, "measure", measure)
    return found


def talk_in(models: Path, folder: Path, *, users: int = 4) -> Talk:
    """A database beside the models, with 24 thumbs by as many users as there are."""
    folder.mkdir(parents=True, exist_ok=True)
    talk = Talk(folder / "feedback.db")
    talk.store.move_version("base", models / "base")
    vote(talk, 0, users=users)
    return talk


def vote(talk: Talk, first: int, *, users: int = 4, version: str = "base", judge: Any = lambda i: i % 3 > 0) -> None:
    rng = random.Random(first)
    numbers = range(first, first + 24)
    talk.answers(*((f"a{i}", sentence(rng, 5), sentence(rng, 4)) for i in numbers), version=version)
    talk.said(*((f"u{i % users}", "thumb", f"a{i}", judge(i)) for i in numbers))


def options(talk: Talk, **changes: Any) -> OnlineConfig:
    given: dict[str, Any] = {"serve": str(talk.store.database.path), "rounds": 1, "wait": False, "min_feedback": 20, "train": dict(TRAIN)}
    return OnlineConfig(**{**given, **changes})


def weights(round_folder: Path) -> str:
    return hashlib.sha256((round_folder / "run/final/adapter_model.safetensors").read_bytes()).hexdigest()


def states(store: Store) -> dict[str, str]:
    return {version.name: version.state for version in store.versions() if version.name != "one"}


def test_a_better_version_goes_live_and_the_next_round_begins_with_it(talk: Talk, figures: dict, tmp_path: Path):
    assert online(options(talk)) == 0
    folder = tmp_path / "online" / "round-0001"
    assert states(talk.store) == {"base": "retired", "round-0001": "live"}
    version = talk.store.version("round-0001")
    assert version.folder == str(folder / "run/final") and version.parent == "base"
    assert version.metrics["win_rate"] == 0.9 and version.metrics["kl"] == 0.01 and version.metrics["win_rate_high"] == 0.94
    event = talk.store.events()[-1]
    assert event.kind == "round" and event.detail["promoted"] is True and "0.9" in event.detail["reasons"]
    assert not (folder / "run/checkpoints").exists() and (folder / "run/report.html").is_file()
    assert "round-0001" in (tmp_path / "online/report.html").read_text()

    assert online(options(talk)) == 0  # nothing new, and so nothing is done
    assert not (tmp_path / "online/round-0002").exists()
    vote(talk, 100)
    assert online(options(talk, reference="moving")) == 0
    assert states(talk.store) == {"base": "retired", "round-0001": "retired", "round-0002": "live"}
    second = yaml.safe_load((tmp_path / "online/round-0002/run/config.yaml").read_text())
    assert second["lora"]["adapter"] == str(folder / "run/final") and second["lora"]["reference"] == "start"
    assert second["model"]["path"] == talk.store.version("base").folder
    rows = (tmp_path / "online/round-0002/data/train.jsonl").read_text().splitlines()
    assert len(rows) > 24  # older feedback is repeated
    assert weights(tmp_path / "online/round-0002") != weights(folder)
    vote(talk, 200)
    assert online(options(talk)) == 0
    third = yaml.safe_load((tmp_path / "online/round-0003/run/config.yaml").read_text())
    assert third["lora"]["reference"] == "base"


def test_a_worse_version_is_kept_and_not_promoted(talk: Talk, figures: dict, tmp_path: Path):
    figures.update(BAD)
    assert online(options(talk)) == 0
    assert states(talk.store) == {"base": "live", "round-0001": "candidate"}
    assert (tmp_path / "online/round-0001/run/final/adapter_model.safetensors").is_file()
    assert talk.store.events()[-1].detail["promoted"] is False
    vote(talk, 100)
    figures.update(GOOD)
    online(options(talk))
    assert talk.store.version("round-0002").parent == "base"  # not what was rejected


def test_a_loop_that_is_killed_anywhere_ends_as_one_that_was_not(models: Path, figures: dict, tmp_path: Path, monkeypatch):
    """After each of its durable steps, which is before the next one, and between training and measurement."""
    with monkeypatch.context() as patch:
        undisturbed = talk_in(models, tmp_path / "undisturbed")
        writes = Deaths(patch)
        online(options(undisturbed))
        undisturbed.store.close()
    wanted, count = weights(tmp_path / "undisturbed/online/round-0001"), writes.seen
    assert count == 6  # begun, collected, measured, promoted, closed, and the page
    for death in (1, 3, 4, 5, 7, 9, 11):
        folder = tmp_path / f"killed{death}"
        talk = talk_in(models, folder)
        with monkeypatch.context() as patch:
            Deaths(patch, death)
            with pytest.raises(Killed):
                online(options(talk))
        online(options(talk, rounds=None))
        assert states(talk.store) == {"base": "retired", "round-0001": "live"}, death
        assert weights(folder / "online/round-0001") == wanted, death
        kinds = [event.kind for event in talk.store.events() if event.detail.get("version") == "round-0001"]
        assert kinds.count("promoted") == 1 and kinds.count("version added") == 1, death
        assert kinds.count("round") == 1, death
        assert not (folder / "online/round-0002").exists()
        talk.store.close()


class Deaths:
    """Ends the process at its `death`-th chance: there is one before and one after each durable step. None: only counts them."""

    def __init__(self, patch: pytest.MonkeyPatch, death: int | None = None) -> None:
        self.death, self.seen = death, 0
        for target, name in ((rounds_module, "write_text"), (Database, "promote"), (module, "write_page")):
            patch.setattr(target, name, self.wrapped(getattr(target, name)))

    def wrapped(self, call: Any) -> Any:
        def perhaps(*given: Any, **named: Any) -> Any:
            place, self.seen = self.seen, self.seen + 1
            if self.death == 2 * place:
                raise Killed
            found = call(*given, **named)
            if self.death == 2 * place + 1:
                raise Killed
            return found

        return perhaps


def test_what_an_operator_took_back_is_not_promoted_again(talk: Talk, figures: dict, monkeypatch):
    with monkeypatch.context() as patch:
        Deaths(patch, 7)  # right after the promotion
        with pytest.raises(Killed):
            online(options(talk))
    assert states(talk.store)["round-0001"] == "live"
    talk.store.roll_back("base", reason="by hand")
    online(options(talk))
    assert states(talk.store) == {"base": "live", "round-0001": "rolled_back"}


def test_no_version_is_promoted_over_one_that_it_was_not_compared_with(talk: Talk, figures: dict, monkeypatch, models: Path):
    measure = module.measure

    def meanwhile(*given: Any, **named: Any) -> dict[str, Any]:
        talk.store.promote("one")
        return measure(*given, **named)

    monkeypatch.setattr(module, "measure", meanwhile)
    online(options(talk))
    assert talk.store.version("one").state == "live" and states(talk.store)["round-0001"] == "candidate"
    assert "not promoted: " in talk.store.events()[-1].detail["reasons"]


def test_what_people_like_less_is_taken_back(talk: Talk, monkeypatch):
    talk.store.promote("one")
    monkeypatch.setattr(module, "fallen", lambda store, config, good_rating: "fewer thumbs are up")
    online(options(talk, min_feedback=1000))
    assert states(talk.store) == {"base": "live"} and talk.store.version("one").state == "rolled_back"
    assert talk.store.events()[-1].detail["reason"] == "fewer thumbs are up"
    online(options(talk, min_feedback=1000))  # the first version replaced none
    assert states(talk.store) == {"base": "live"}


def test_a_training_that_diverges_ends_its_round(talk: Talk, figures: dict, monkeypatch):
    def diverging(self: Any, config: Any) -> None:
        raise NumericsError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr(OwnModels, "train", diverging)
        online(options(talk))
    assert "diverged" in talk.store.events()[-1].detail["reasons"]
    vote(talk, 100)
    online(options(talk))
    assert states(talk.store) == {"base": "retired", "round-0002": "live"}


def test_feedback_that_teaches_nothing_ends_its_round(talk: Talk, figures: dict, tmp_path: Path):
    online(options(talk))
    vote(talk, 100, version="one")
    talk.said(*((f"v{i % 4}", "thumb", f"a{i}", i % 3 == 0) for i in range(124)[100:]))  # each is contradicted
    online(options(talk, collect=CollectConfig(replay=0.0)))
    assert "no rows are left" in talk.store.events()[-1].detail["reasons"]
    assert not (tmp_path / "online/round-0002/run").exists()


def test_praise_alone_teaches_nothing_and_is_kept_for_later(talk: Talk, figures: dict, tmp_path: Path):
    config = options(talk, collect=CollectConfig(replay=0.0))
    online(config)
    for first, judge in ((100, lambda i: True), (200, lambda i: i % 3 > 0)):
        vote(talk, first, judge=judge)
        online(config)
    closed = [event.detail for event in talk.store.events() if event.kind == "round"]
    assert "judged alike" in closed[1]["reasons"] and not (tmp_path / "online/round-0002/run").exists()
    assert closed[2]["promoted"] is True


def test_a_preview_changes_nothing(talk: Talk, tmp_path: Path, caplog):
    before = len(talk.store.events())
    with caplog.at_level("INFO", logger="fastalign"):
        assert online(options(talk, dry_run=True)) == 0
    assert "24 new judgements" in caplog.text and "kto: " in caplog.text
    assert not (tmp_path / "online").exists() and len(talk.store.events()) == before


def test_a_reward_model_is_trained_and_then_followed(talk: Talk, figures: dict, tmp_path: Path):
    rng = random.Random(5)
    for i in range(12):
        talk.answers((f"p{i}", f"question {i}", sentence(rng, 3)), (f"q{i}", f"question {i}", sentence(rng, 3)))
        talk.said((f"u{i % 4}", "choice", f"p{i}", (f"q{i}",)))
    train = {"lora.r": 4, "max_steps": 1, "learning_rate": 1e-3, "batch_size": 2, "num_generations": 2, "max_completion_length": 4}
    train |= {"max_tokens": 512}
    online(options(talk, reward_model=True, train=train, reward={"lora.r": 4, "max_steps": 1, "learning_rate": 1e-3}))
    folder = tmp_path / "online/round-0001"
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert config["rewards"] == [str(folder / "reward/final")] and "num_generations" in config
    assert states(talk.store)["round-0001"] == "live"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"output": "x"}}, "train: output is for the loop to decide"),
        ({"train": {"lora": {"adapter": "x"}}}, r"train: lora\.adapter is for the loop"),
        ({"train": {"learning_rat": 1}}, "train: option learning_rat is unknown; did you mean learning_rate"),
        ({"train": {"learning_rate": -1.0}}, "train: learning_rate must be 0 or more"),
        ({"train": {"loss_type": "ipo"}}, "train: "),  # for pairs only, and what comes is not known before
        ({"reward": {"epochs": 2}}, "set --reward_model true"),
        ({"serve": ""}, "no service given"),
        ({"serve": "nowhere.db"}, "no such database"),
        ({"data": "x.db"}, "data counts only with the address"),
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"poll": 0.0}, "poll must be positive"),
    ],
)
def test_mistakes_show_before_anything_is_done(talk: Talk, tmp_path: Path, changes: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        online(options(talk, **changes))
    assert not list(tmp_path.glob("online/round*"))


def test_one_loop_at_a_time(talk: Talk, tmp_path: Path):
    with locked(tmp_path / "online"), pytest.raises(OutputError, match="another process is at work"):
        online(options(talk))


def test_a_whole_model_cannot_be_trained_further_by_adapters(talk: Talk, models: Path):
    talk.store.add_version("whole", models / "base")
    talk.store.promote("whole")
    with pytest.raises(ConfigError, match="whole is a whole model"):
        online(options(talk))


def test_a_running_service_answers_with_the_new_version(models: Path, figures: dict, tmp_path: Path):
    with Running(config_for(models, tmp_path, open=True)) as running:
        talk = Talk.__new__(Talk)
        talk.store = running.store
        vote(talk, 0)
        assert online(options(talk, serve=running.url)) == 0
        assert running.engine.models.current.version == "round-0001"
        assert states(running.store) == {"base": "retired", "round-0001": "live"}


def kill_at_random_moments(models: Path, folder: Path, moments: int, seed: int) -> None:
    """The command itself is killed again and again, until a round has ended; it ends as one that was not."""
    wanted = ""
    for kills in (0, moments):
        home = folder / str(kills)
        talk = talk_in(models, home)
        talk.store.close()
        config = home / "loop.yaml"
        config.write_text(yaml.safe_dump({"train": {**TRAIN, "max_steps": 12}, "gate": {"min_comparisons": 1}, "measure": {"prompts": 4}}))
        command = [sys.executable, "-m", "fastalign", "online", "--serve", str(home / "feedback.db"), "--config", str(config)]
        command += ["--rounds", "1", "--wait", "false", "--min_feedback", "20"]
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        rng, took = random.Random(seed), 0.0
        for _ in range(kills):
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
            time.sleep(rng.uniform(0.3, 1.0) * 10)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        began = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        took = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        assert took < 120
        with Store(home / "feedback.db") as store:
            versions = {version.name: version for version in store.versions()}
            assert "round-0001" in versions and [version.state for version in versions.values()].count("live") == 1
            kinds = [event.kind for event in store.events() if event.detail.get("version") == "round-0001"]
            assert kinds.count("version added") == 1 and kinds.count("promoted") <= 1
        if not kills:
            wanted = weights(home / "online/round-0001")
        assert weights(home / "online/round-0001") == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_loop_killed_at_twenty_random_moments(models: Path, tmp_path: Path):
    kill_at_random_moments(models, tmp_path, 20, 1)


def test_a_stopped_loop_says_where_it_goes_on(talk: Talk, figures: dict, monkeypatch, caplog):
    monkeypatch.setattr(OwnModels, "train", lambda self, config: "SIGTERM")
    assert online(options(talk)) == 128 + signal.SIGTERM
    assert "goes on when the loop is started again" in caplog.text
    assert states(talk.store) == {"base": "live"}


def test_the_loop_waits_for_feedback_and_can_be_stopped(talk: Talk, figures: dict, tmp_path: Path):
    base = talk.store.version("base")
    config = options(talk, wait=True, rounds=None, poll=0.02)
    loop = Loop(config, talk.store, Database(talk.store), OwnModels(ModelConfig(path=base.folder)), tmp_path / "online", base)
    seen = []

    def after(done: Any) -> None:
        seen.append(done.name)
        if len(seen) == 1:
            vote(talk, 100)
        else:
            loop.stopping.set()

    with torch.random.fork_rng(devices=[]):
        loop.run(after)
    assert seen == ["round-0001", "round-0002"]
