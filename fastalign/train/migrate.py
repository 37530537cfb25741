"""`fastalign migrate`: a config of TRL's as one of ours, with a list of what it could not carry over, and why.

Read are YAML files as `trl dpo --config` takes them, and what `to_dict()` of a TRL 1.16 config gives, as JSON or YAML. Nothing that a
file says is imported or called, and pickles are not read.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastalign.errors import ConfigError, OutputError
from fastalign.train.config import load, read_mapping, write_text
from fastalign.train.migrate_rules import RULES, Outcome, text_of
from fastalign.train.migrate_table import TRAINERS, Rule, fields_of
from fastalign.train.options import nearest, options

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # YAML 1.1 takes 1e-6 for text, the parsers of TRL do not

# What is TRL's way without being an option of TRL's.
ALSO: dict[str, dict[str, Any]] = {
    "orpo": {"nll_scope": "all"},
    "grpo": {"data.max_length": None},
    "rloo": {"data.max_length": None},
}
NOTES: dict[str, tuple[str, ...]] = {
    "kto": ("the KL is estimated over the whole step; --kl_scope microbatch is TRL's way, and depends on max_tokens",),
    "orpo": ("nll_scope: all, because TRL's likelihood counts the tokens of prompts, too; the default here counts answers alone",),
    "grpo": (
        "prompts of any length are taken, as in TRL; --data.max_length leaves long ones out",
        "tokens and answers are counted over an optimizer step; docs/online.md says where that differs from TRL",
    ),
    "rloo": ("prompts of any length are taken, as in TRL; --data.max_length leaves long ones out",),
    "gkd": ("on answers of its own the loss is divided by their tokens, where TRL counts those of the data's completions",),
    "online_dpo": ("answers that are rewarded alike are no pair, where TRL takes the first as the better one",),
}
_SEQUENCES = {"dpo": 2, "orpo": 2, "cpo": 2, "reward": 2, "sft": 1, "kto": 1, "gkd": 1}  # of a sample, which max_tokens has to hold
_TOKENS = 4096


@dataclass
class MigrateConfig:
    """Turns a config of TRL's into one of ours, and lists what could not be carried over, and why."""

    trainer: str = ""  # whose config it is: sft, reward, dpo, kto, orpo, cpo, grpo, rloo, gkd or online_dpo
    path: str = ""  # the config: YAML as `trl dpo --config` takes it, or to_dict() of a TRL config as JSON or YAML
    output: str = ""  # YAML file to write; empty: the name of the file with .fastalign.yaml in place of its suffix
    overwrite: bool = False  # replace the output if it is there

    def validate(self) -> None:
        """Raise ConfigError for a trainer that is not known, and where no file is named."""
        if self.trainer not in TRAINERS:
            near = nearest(self.trainer, TRAINERS)
            ppo = "; TRL 1.16 has no PPO any more" if self.trainer == "ppo" else ""
            remedy = f"did you mean {near}?" if near else f"there are {', '.join(TRAINERS)}"
            raise ConfigError(f"trainer must be that of the config, got {self.trainer!r}{ppo}; {remedy}")
        if not self.path:
            raise ConfigError(f"migrate needs a file: fastalign migrate {self.trainer} config.yaml")

    @property
    def target(self) -> Path:
        """The file to write."""
        return Path(self.output) if self.output else Path(self.path).with_suffix(".fastalign.yaml")


@dataclass
class Migration:
    """A converted config and what is to be said of it, each a line."""

    trainer: str
    source: Path
    options: dict[str, Any]  # of ours, dotted
    lost: list[str] = field(default_factory=list)  # what is not carried over, and why
    same: list[str] = field(default_factory=list)  # what makes no difference here
    differing: list[str] = field(default_factory=list)  # TRL's defaults that are not ours; they are written
    notes: list[str] = field(default_factory=list)

    def yaml(self, name: str) -> str:
        """The file, as `--config` takes it; what was lost stands in its comments."""
        nested: dict[str, Any] = {}
        for option, value in self.options.items():
            *sections, leaf = option.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
        head = [f"# From {self.source.name}, a config of TRL's. Train: fastalign {self.trainer} --config {name}"]
        head += [f"# not carried over: {line}" for line in self.lost]
        return "\n".join(head) + "\n" + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=1000)

    def report(self) -> str:
        """All that there is to say, for a reader."""
        titles = {
            "not carried over": self.lost,
            "makes no difference here": self.same,
            "defaults of TRL's that are not ours (written)": self.differing,
            "to know": self.notes,
        }
        return "\n".join(f"{title}:\n" + "\n".join(f"  {line}" for line in lines) for title, lines in titles.items() if lines)


def migrate(trainer: str, path: Path, config_class: Any) -> Migration:
    """The config of TRL's `trainer` in the file `path` as one of `config_class`, ours. Raises ConfigError for a file that is not one."""
    rules = fields_of(trainer)
    given = read_trl(path)
    values = {name: rule.default for name, rule in rules.items()}
    changed = set()
    unknown: list[str] = []
    for name, value in given.items():
        if name not in rules:
            near = nearest(name, rules)
            unknown.append(f"{name}: {text_of(value)} (no field of TRL 1.16's config{f'; did you mean {near}?' if near else ''})")
            continue
        value = _typed(value, rules[name])
        if value != rules[name].default and value not in rules[name].dumped:
            changed.add(name)
        values[name] = value
    out = Outcome(trainer, values, changed)
    for name, rule in rules.items():
        if rule.option and (values[name] is not None or name in changed):
            out.set(rule.option, values[name], name)
        for where, why in ((out.lost, rule.lost), (out.same, rule.same)):
            if why:
                out.drop(where, why, name)
    for rule_name in dict.fromkeys(rule.rule for rule in rules.values() if rule.rule):
        try:
            RULES[rule_name](out)
        except (TypeError, ValueError, AttributeError) as error:
            read = ", ".join(name for name in given if name in rules and rules[name].rule == rule_name)
            raise ConfigError(f"{path}: {read}: not values as TRL has them ({error})") from error
    for option, value in ALSO.get(trainer, {}).items():
        out.set(option, value)
    if (tokens := (out.options.get("data.max_length") or 0) * _SEQUENCES.get(trainer, 0)) > _TOKENS:
        out.set("max_tokens", tokens)
    out.notes.append("max_tokens bounds a micro-batch in place of per_device_train_batch_size; the result does not depend on it")
    return _finished(out, path, [*unknown, *out.lost], config_class)


def read_trl(path: Path) -> dict[str, Any]:
    """The fields in a file. Raises ConfigError for a file that cannot be read, and for a pickle."""
    try:
        head = path.open("rb").read(4)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror}); give the path of a YAML or JSON file") from error
    if path.suffix == ".bin" or head[:2] == b"PK" or head[:1] == b"\x80":
        raise ConfigError(
            f"{path}: a pickle, which would run code of its own to be read. Write the config as JSON, where it can be trusted: "
            "json.dump(trainer.args.to_dict(), open('args.json', 'w'))"
        )
    if path.suffix != ".json":
        return read_mapping(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object with the fields of a config, got {type(content).__name__}")
    return content


def write(config: MigrateConfig, config_class: Any) -> Migration:
    """Convert `config.path` and write `config.target`. Raises ConfigError, and OutputError where the file is there already."""
    if config.target.exists() and not config.overwrite:
        raise OutputError(f"{config.target} is there already; set --overwrite, or name another --output")
    found = migrate(config.trainer, Path(config.path), config_class)
    write_text(config.target, found.yaml(config.target.name))
    return found


def _finished(out: Outcome, path: Path, lost: list[str], config_class: Any) -> Migration:
    """With defaults compared, and the result put to the test of our own config."""
    ours = options(config_class)
    differing = [
        f"{option}: {text_of(value)} (ours: {text_of(ours[option].default)})"
        for option, value in out.options.items()
        if value != ours[option].default and (sources := out.sources[option]) and not out.changed.intersection(sources)
    ]
    kept = {
        option: value
        for option, value in out.options.items()
        if value != ours[option].default or out.changed.intersection(out.sources[option])
    }
    found = Migration(out.trainer, path, kept, lost, out.same, differing, out.notes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        try:
            file.write_text(found.yaml(file.name), encoding="utf-8")
            config: Any = load(file, config_class)
            config.output, config.model.path, config.data.path = "run", config.model.path or "model", config.data.path or "data.jsonl"
            if hasattr(config, "rewards"):
                config.rewards = config.rewards or ["exact_match"]
            if hasattr(config, "teacher"):
                config.teacher.path = config.teacher.path or "teacher"
            config.validate()
        except ConfigError as error:
            found.lost.append(f"the whole, until this is mended: {str(error).replace(f'{file}: ', '')}")
    return found


def _typed(value: Any, rule: Rule) -> Any:
    """`value` as the parsers of TRL read it: numbers from text, and true and false."""
    if isinstance(value, str) and not isinstance(rule.default, str):
        if _NUMBER.fullmatch(value):
            number = float(value)
            return int(number) if number.is_integer() and not isinstance(rule.default, float) else number
        if isinstance(rule.default, bool) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    return value
