"""Which judge the options name, whatever it judges: `fastalign label`, `eval` and the online algorithms read the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from fastalign.data.messages import Turns
from fastalign.errors import ConfigError, DataError, JudgeError
from fastalign.rollout.judges import CRITERIA, EndpointJudge, Judge, Verdict, load_function
from fastalign.rollout.reward_model import RewardModel
from fastalign.rollout.rewards import Rewards


@dataclass
class JudgeConfig:
    """Who judges: one of function, url or model."""

    function: str | None = None
    """MODULE:FUNCTION or FILE.py:FUNCTION with the signature of a reward function: (prompts, completions, **columns) -> scores."""
    url: str | None = None
    """Base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    model: str | None = None
    """With url: the model's name there. Without: folder of a reward model."""
    mode: Literal["compare", "rate"] = "compare"
    """compare: which of two is better, asked in both orders; rate: a number for each. Endpoints only."""
    scale: list[float] = field(default_factory=lambda: [1.0, 10.0])
    """Lowest and highest rating."""
    criteria: str = CRITERIA
    """What makes an answer better, in a sentence or two."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    timeout: float = 60.0
    """Seconds to wait for one reply."""
    retries: int = 3
    """Further attempts after a failed request, and after a reply without a verdict."""
    workers: int = 8
    """Rows that are being judged at the same time by an endpoint."""

    @property
    def is_named(self) -> bool:
        return bool(self.function or self.url or self.model)

    def validate(self) -> None:
        """Raise ConfigError for the first option that is missing or out of range."""
        if bool(self.function) == bool(self.url or self.model):
            raise ConfigError(
                "judge: name one judge: --judge.function FILE.py:FUNCTION, --judge.url URL --judge.model NAME, or --judge.model DIR"
            )
        if self.url and not self.model:
            raise ConfigError("judge.model: name the model to ask at judge.url")
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise ConfigError(f"judge.scale must be two rising numbers, got {self.scale}")
        if self.timeout <= 0 or self.retries < 0 or self.workers < 1:
            raise ConfigError(
                f"judge.timeout must be positive, retries 0 or more, workers 1 or more: {self.timeout}, {self.retries}, {self.workers}"
            )


def build_judge(config: JudgeConfig) -> Judge:
    """The judge that the options name."""
    if config.function:
        return load_function(config.function)
    assert config.model is not None
    if config.url is None:
        return RewardModelJudge(config.model)
    return EndpointJudge(
        config.url,
        config.model,
        mode=config.mode,
        scale=(config.scale[0], config.scale[1]),
        criteria=config.criteria,
        api_key_env=config.api_key_env,
        timeout=config.timeout,
        retries=config.retries,
    )


class RewardModelJudge:
    """The scores of a reward model."""

    on_device = True

    def __init__(self, path: str) -> None:
        self.reward = RewardModel(path)
        self.fingerprint = f"reward model {self.reward.fingerprint}"

    def __call__(self, prompt: Turns, completions: Sequence[Turns], columns: dict[str, Any]) -> Verdict:
        n = len(completions)
        try:
            return Verdict(tuple(self.reward([prompt] * n, completions, tools=[columns.get("tools")] * n)))
        except DataError as error:
            raise JudgeError(str(error)) from error


class JudgeReward:
    """A judge as a reward function: its scores of the answers to a prompt; None for all of them when it reaches no verdict.

    Raises JudgeError when it reaches none on any prompt.
    """

    def __init__(self, judge: Judge, size: int, workers: int) -> None:
        self.judge, self.size = judge, size
        self.on_device = getattr(judge, "on_device", False)
        self.workers = workers if isinstance(judge, EndpointJudge) else 1

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any) -> Rewards:
        columns.pop("completion_ids", None)
        starts = range(0, len(prompts), self.size)

        def verdict(start: int) -> tuple[float, ...] | JudgeError:
            row = {name: values[start] for name, values in columns.items()}
            try:
                return self.judge(prompts[start], completions[start : start + self.size], row).scores
            except JudgeError as error:
                return error

        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = list(pool.map(verdict, starts))
        failed = [v for v in verdicts if isinstance(v, JudgeError)]
        if failed and len(failed) == len(verdicts):
            raise failed[-1]
        return [score for v in verdicts for score in ([None] * self.size if isinstance(v, JudgeError) else v)]
