"""Where preference data comes from and how it is cut; the `--data.*` options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastalign.errors import ConfigError

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "weight")


@dataclass
class DataConfig:
    """Options of the data set; every length is in tokens.

    Args:
        path: JSON, JSONL or Parquet file, a folder written by `datasets.save_to_disk`, or a data set's name on the hub.
        split: which split of a folder or hub data set to train on.
        subset: configuration name of a hub data set, if it has several.
        eval_path: held-out data, in any of the formats of `path`.
        eval_split: held-out split of the same folder or hub data set (or of `eval_path`).
        eval_fraction: hold out about this fraction of the pairs, chosen by prompt: no prompt is in both parts.
        max_length: longest sequence (prompt and completion); longer ones are cut. None: never cut.
        truncation: keep_start cuts the completion's end, keep_end cuts the prompt's start.
        chat_template: Jinja file to use in place of the tokenizer's own chat template.
        columns: our column name -> its name in the data, such as {prompt: question}.
    """

    path: str = ""
    split: str = "train"
    subset: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.0
    max_length: int | None = 1024
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    chat_template: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

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
