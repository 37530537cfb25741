"""Where preference data comes from and how it is cut; the `--data.*` options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastalign.errors import ConfigError

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "weight")


@dataclass
class DataConfig:
    """Options of the data set. Lengths are in tokens."""

    path: str = ""  # JSON, JSONL or Parquet file, a folder written by datasets.save_to_disk, or a hub data set's name
    split: str = "train"  # split of a folder or hub data set to train on
    subset: str | None = None  # configuration of a hub data set that has several
    eval_path: str | None = None  # held-out data, in any of the formats of path
    eval_split: str | None = None  # held-out split of eval_path, or of path without it
    eval_fraction: float = 0.0  # hold out this fraction of the pairs, chosen by prompt: no prompt is in both parts
    max_length: int | None = 1024  # longest sequence (prompt and completion); longer ones are cut; none: never cut
    truncation: Literal["keep_start", "keep_end"] = "keep_start"  # cut a completion's end, or a prompt's start
    chat_template: str | None = None  # Jinja file to use in place of the tokenizer's chat template
    columns: dict[str, str] = field(default_factory=dict)  # our column name: its name in the data, as {prompt: question}

    def validate(self) -> None:
        """Raises ConfigError naming the option that is out of range or contradicts another one."""
        if not self.path:
            raise ConfigError("data.path is empty: name a JSON, JSONL or Parquet file, a saved data set folder, or a hub data set")
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError(f"data.eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.eval_fraction and (self.eval_path or self.eval_split):
            raise ConfigError("data.eval_fraction holds out part of data.path; leave out either it or data.eval_path / data.eval_split")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"data.max_length must be at least 2 (a prompt token and a completion token), got {self.max_length}")
        if self.truncation not in ("keep_start", "keep_end"):
            raise ConfigError(f"data.truncation must be 'keep_start' or 'keep_end', got {self.truncation!r}")
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise ConfigError(f"data.columns maps {unknown[0]!r}, which is not one of our columns: {', '.join(COLUMNS)}")
