"""Options of `fastalign online`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastalign.errors import ConfigError
from fastalign.serve.loop.collect import CollectConfig
from fastalign.serve.loop.gate import GateConfig
from fastalign.serve.loop.live import LiveConfig
from fastalign.serve.loop.measure import MeasureConfig


@dataclass
class OnlineConfig:
    """Learns from the feedback on a service's answers, round by round: makes a data set of it, trains an adapter from the version
    that answers now, measures the two, and lets the new one answer only if it is no worse."""

    serve: str = ""  # address of the service, such as http://127.0.0.1:8000, or its database where no service runs
    data: str = ""  # database of the service; empty: the service is asked where it is
    output: str = ""  # folder of the rounds; empty: online, beside the database
    token_env: str = "FASTALIGN_TOKEN"  # environment variable with an operator's token, which an open service does not want
    rounds: int | None = None  # end after so many rounds; null: go on until stopped
    wait: bool = True  # wait for feedback where there is not enough for a round; false: end
    poll: float = 10.0  # seconds from one look at the feedback to the next
    min_feedback: int = 100  # new judgements that begin a round
    dry_run: bool = False  # tell what the next round would learn from, and change nothing
    seed: int = 0  # of the replay, the training and the measurements

    collect: CollectConfig = field(default_factory=CollectConfig)
    reward_model: bool = False  # train a reward model on the pairs of each round, and then by GRPO against it
    reference: Literal["fixed", "moving"] = "fixed"  # what training holds the policy to: the base model, or the version before
    train: dict[str, Any] = field(default_factory=dict)  # options of the training runs, as in the config file of a run
    reward: dict[str, Any] = field(default_factory=dict)  # options of the reward models' runs
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    live: LiveConfig = field(default_factory=LiveConfig)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the models that are measured
    device: str = "auto"  # auto: cuda where there is one, else cpu

    def validate(self) -> None:
        """Raises ConfigError for options that contradict each other or are out of range."""
        if not self.serve:
            raise ConfigError("serve: no service given; set --serve to its address, or to its database where none runs")
        if self.data and not self.is_remote:
            raise ConfigError("data counts only with the address of a service; --serve names the database already")
        for name in ("rounds", "min_feedback"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        if not self.poll > 0:
            raise ConfigError(f"poll must be positive, got {self.poll}")
        if self.reward and not self.reward_model:
            raise ConfigError("reward: options of a reward model, which none is trained; set --reward_model true")
        if self.reward_model and self.collect.objective == "kto":
            raise ConfigError("reward_model learns from pairs; leave collect.objective at auto")
        for section in (self.collect, self.measure, self.gate, self.live):
            section.validate()

    @property
    def is_remote(self) -> bool:
        """Whether `serve` is an address."""
        return self.serve.startswith(("http://", "https://"))

    def folder(self, database: Path) -> Path:
        """Where the rounds are."""
        return Path(self.output) if self.output else database.parent / "online"
