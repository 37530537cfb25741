"""Where training data comes from and how it is cut; the `--data.*` options of each kind of data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastalign.errors import ConfigError

_OPTIONAL = ("tools", "chat_template_kwargs", "weight")
_PAIR = ("prompt", "chosen", "rejected")


@dataclass
class SourceConfig:
    """Options of where rows come from."""

    column_names: ClassVar[tuple[str, ...]] = _OPTIONAL
    purpose: ClassVar[str] = ""  # what the rows are for, as an error says it
    needs: ClassVar[str] = ""  # the columns that this takes

    path: str = ""  # JSON, JSONL or Parquet file, a folder written by datasets.save_to_disk, or a hub data set's name
    split: str = "train"  # split of a folder or hub data set to read
    subset: str | None = None  # configuration of a hub data set that has several
    columns: dict[str, str] = field(default_factory=dict)  # our column name: its name in the data, as {prompt: question}

    def validate(self) -> None:
        """Raises ConfigError naming the option that is out of range or contradicts another one."""
        if not self.path:
            raise ConfigError("data.path is empty: name a JSON, JSONL or Parquet file, a saved data set folder, or a hub data set")
        if unknown := sorted(set(self.columns) - set(self.column_names)):
            raise ConfigError(f"data.columns maps {unknown[0]!r}, which is not one of our columns: {', '.join(self.column_names)}")


@dataclass
class ScaleConfig(SourceConfig):
    """Options of rows with scores."""

    scale_min: float | None = None  # smallest score that the scale allows; one below it is an error
    scale_max: float | None = None  # largest score that the scale allows; one above it is an error

    def validate(self) -> None:
        super().validate()
        low, high = self.scale
        if not low < high:
            raise ConfigError(f"data.scale_min must be below data.scale_max, got {low:g} and {high:g}")

    @property
    def scale(self) -> tuple[float, float]:
        """Smallest and largest score, infinite where not given."""
        return -math.inf if self.scale_min is None else self.scale_min, math.inf if self.scale_max is None else self.scale_max


@dataclass
class DataConfig(SourceConfig):
    """Options of the data set. Lengths are in tokens."""

    column_names: ClassVar[tuple[str, ...]] = (*_PAIR, *_OPTIONAL)
    purpose: ClassVar[str] = "preference training"
    needs: ClassVar[str] = "'prompt', 'chosen' and 'rejected'"

    eval_path: str | None = None  # held-out data, in any of the formats of path
    eval_split: str | None = None  # held-out split of eval_path, or of path without it
    eval_fraction: float = 0.0  # hold out this fraction of the samples, chosen by prompt: no prompt is in both parts
    max_length: int | None = 1024  # longest sequence (prompt and completion); longer ones are cut; none: never cut
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"  # cut a completion's end, a prompt's start, or leave the row out
    deduplicate: bool = False  # drop rows that repeat an earlier row's prompt, completions and labels
    chat_template: str | None = None  # Jinja file to use in place of the tokenizer's chat template

    def validate(self) -> None:
        super().validate()
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError(f"data.eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.eval_fraction and (self.eval_path or self.eval_split):
            raise ConfigError("data.eval_fraction holds out part of data.path; leave out either it or data.eval_path / data.eval_split")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"data.max_length must be at least 2 (a prompt token and a completion token), got {self.max_length}")
        if self.truncation not in ("keep_start", "keep_end", "drop"):
            raise ConfigError(f"data.truncation must be 'keep_start', 'keep_end' or 'drop', got {self.truncation!r}")


@dataclass
class SupervisedDataConfig(DataConfig):
    """Options of a data set of texts, conversations, or prompts with their completions."""

    column_names: ClassVar[tuple[str, ...]] = ("text", "messages", "prompt", "completion", *_OPTIONAL)
    purpose: ClassVar[str] = "supervised fine-tuning"
    needs: ClassVar[str] = "'messages', 'text', or 'prompt' and 'completion'"

    completion_only: bool | None = None  # score completions, not prompts; null: yes where rows have both
    assistant_only: bool = False  # score what the assistant says, as the chat template's {% generation %} marks it


@dataclass
class UnpairedDataConfig(DataConfig):
    """Options of a data set of completions with a label each: desirable or not."""

    column_names: ClassVar[tuple[str, ...]] = (*_PAIR, "completion", "label", *_OPTIONAL)
    purpose: ClassVar[str] = "unpaired preference training"
    needs: ClassVar[str] = "'prompt', 'completion' and 'label'"

    one_class: bool = False  # accept training data whose labels are all desirable, or all undesirable


@dataclass
class RankedDataConfig(DataConfig, ScaleConfig):
    """Options of a data set of pairs or ranked lists of completions, for reward models. Over-long rows are left out by default:
    a reward is read at a sequence's last token."""

    column_names: ClassVar[tuple[str, ...]] = (
        *_PAIR, "margin", "score_chosen", "score_rejected", "completions", "ranks", "scores", *_OPTIONAL
    )  # fmt: skip
    purpose: ClassVar[str] = "reward training"
    needs: ClassVar[str] = "'prompt', 'chosen' and 'rejected', or 'prompt', 'completions' and 'ranks' or 'scores'"

    truncation: Literal["keep_start", "keep_end", "drop"] = "drop"  # of sequences over max_length
    ties: Literal["error", "drop"] = "error"  # completions in the same place of a ranking; drop: keep the first of them

    def validate(self) -> None:
        super().validate()
        if self.ties not in ("error", "drop"):
            raise ConfigError(f"data.ties must be 'error' or 'drop', got {self.ties!r}")


@dataclass
class PromptDataConfig(DataConfig):
    """Options of a data set of prompts to be answered. Prompts longer than max_length are left out."""

    column_names: ClassVar[tuple[str, ...]] = ("prompt", *_OPTIONAL)
    purpose: ClassVar[str] = "online training"
    needs: ClassVar[str] = "'prompt'"

    max_length: int | None = 1024  # longest prompt; rows with a longer one are left out; none: any
    truncation: Literal["keep_start", "keep_end", "drop"] = "drop"  # of prompts over max_length: only drop

    def validate(self) -> None:
        super().validate()
        if self.truncation != "drop":
            raise ConfigError(
                f"data.truncation must be 'drop' for prompts, got {self.truncation!r}: a prompt that is cut asks something else"
            )
