"""What the loop asks of a running service, and how its refusals reach the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from service import Running, config_for, save_models

from fastalign.errors import ConfigError, ModelError, RolloutError, StoreConflictError
from fastalign.serve.loop.switch import Database, Service


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def test_a_version_is_promoted_and_rolled_back_over_http(models: Path, tmp_path: Path):
    with Running(config_for(models, tmp_path, open=True)) as running:
        service = Service(running.url, "NO_SUCH_TOKEN")
        for name in ("one", "two"):
            running.store.add_version(name, models / name)
        assert service.database() == str(tmp_path / "feedback.db")
        service.promote("one", "base")
        assert running.engine.models.current.version == "one"
        with pytest.raises(StoreConflictError, match="one"):
            service.promote("two", "base")  # somebody promoted one meanwhile
        with pytest.raises(StoreConflictError, match="base"):
            service.roll_back("two", "worse")
        assert running.engine.models.current.version == "one"
        service.roll_back("base", "worse")
        assert running.engine.models.current.version == "base"
        assert running.store.events()[-1].detail["reason"] == "worse"
        running.store.move_version("two", tmp_path / "nowhere")
        with pytest.raises(ModelError, match="nowhere"):
            service.promote("two", "base")
        with pytest.raises(RolloutError, match="404"):
            service.promote("three", "base")
        assert running.engine.models.current.version == "base"


def test_only_an_operator_s_token_counts(models: Path, tmp_path: Path, monkeypatch):
    with Running(config_for(models, tmp_path)) as running:
        _, user = running.store.add_token("user")
        _, operator = running.store.add_token("operator")
        for secret in ("", user):
            monkeypatch.setenv("A_TOKEN", secret)
            with pytest.raises(ConfigError, match="environment variable A_TOKEN"):
                Service(running.url, "A_TOKEN").database()
        monkeypatch.setenv("A_TOKEN", operator)
        assert Service(running.url, "A_TOKEN").database() == str(tmp_path / "feedback.db")
    with pytest.raises(RolloutError, match="the service is away"):
        Service(running.url, "A_TOKEN", patience=0).database()


def test_a_database_alone_has_the_same_rules(models: Path, tmp_path: Path):
    from fastalign.serve.store import Store

    with Store(tmp_path / "feedback.db") as store:
        for name in ("base", "one", "two"):
            store.add_version(name, models / name)
        store.promote("base")
        switch = Database(store)
        switch.promote("one", "base")
        with pytest.raises(StoreConflictError):
            switch.promote("two", "base")
        with pytest.raises(StoreConflictError):
            switch.roll_back("two", "worse")
        switch.roll_back("base", "worse")
        live = store.live_version()
        assert live is not None and live.name == "base"
