"""The options of a config dataclass: names, types, defaults, help, and what to say when one is wrong.

A field is the option `--section.name`, its default the option's default, and the comment on its line (or the string under
it) the option's help. Values are checked against the field's type by jsonargparse; nothing is ever imported or called.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastalign.errors import ConfigError

# What people coming from other trainers type; it only feeds the "did you mean" of an unknown option.
_KNOWN_ELSEWHERE = {
    "assistant_only_loss": "data.assistant_only",
    "center_rewards_coefficient": "center_coef",
    "completion_only_loss": "data.completion_only",
    "dataset_name": "data.path",
    "label_smoothing_factor": "label_smoothing",
    "adam_eps": "adam_epsilon",
    "lora_r": "lora.r",
    "lora_target_modules": "lora.targets",
    "loss": "loss_type",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "model_name_or_path": "model.path",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "report_to": "loggers",
    "resume_from_checkpoint": "resume",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "train_batch_size": "batch_size",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
}

# The sections of `--help` for the fields of the run itself; a nested dataclass is a section of its own.
_SECTIONS = {
    "run": ("output", "resume", "overwrite", "seed"),
    "batches and length": ("batch_size", "max_tokens", "epochs", "max_steps", "logits_budget", "share_prompts"),
    "optimisation": (
        "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "optimizer", "update_in_backward", "master_weights", "stochastic_rounding", "max_nonfinite",
    ),
    "evaluation, checkpoints and logs": ("eval_every", "save_every", "keep_checkpoints", "log_every", "loggers", "metrics", "profile"),
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One leaf field of a config dataclass."""

    name: str  # dotted, as after the two dashes
    type: Any
    default: Any  # MISSING: must be given
    help: str
    section: str  # dotted name of the nested dataclass, "" at the top
    owner: type  # the class that declares the field

    @property
    def is_list(self) -> bool:
        return any(get_origin(t) in (list, tuple) or t in (list, tuple) for t in members(self.type))

    @property
    def takes_text(self) -> bool:
        return str in members(self.type)


def options(config_class: type) -> dict[str, Option]:
    """Every option of a config dataclass by dotted name, in the order of the fields."""
    return {option.name: option for option in _walk(config_class, "", MISSING)}


def _walk(cls: type, prefix: str, defaults: Any) -> Iterator[Option]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], prefix + field.name
        default = getattr(defaults, field.name) if defaults is not MISSING and defaults is not None else default_of(field)
        if nested := nested_class(kind):
            yield from _walk(nested, f"{name}.", default)
        else:
            yield Option(name, kind, default, notes(cls).get(field.name, ""), prefix.rstrip("."), cls)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, made if need be; MISSING when it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def nested_class(kind: Any) -> type | None:
    """The dataclass of a field that is one, or one or None."""
    return next((member for member in members(kind) if isinstance(member, type) and dataclasses.is_dataclass(member)), None)


@cache
def notes(cls: type) -> dict[str, str]:
    """Field name -> the comment on its line, or the string under it, of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # no source (an interpreter session): options without help
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        for statement, after in zip(body, [*body[1:], None]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = next((comments[line] for line in (statement.end_lineno, statement.lineno) if line in comments), "")
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                    text = after.value.value
                found[statement.target.id] = " ".join(text.split())
    return found


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one: the same word in another section first, then by spelling."""
    names = list(names)
    if (known := _KNOWN_ELSEWHERE.get(name)) in names:
        return known
    leaf = name.rpartition(".")[2]
    same_leaf = [other for other in names if other.rpartition(".")[2] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    leaves = {other.rpartition(".")[2]: other for other in names}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[close[0]] if close else None


def convert(option: Option, value: Any, place: str) -> Any:
    from jsonargparse import ArgumentParser

    try:
        if value is None and type(None) not in members(option.type):
            raise TypeError
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=option.type)
        return parser.parse_object({"value": value}, defaults=False).value
    except Exception as error:
        shown = "nothing" if value is None else f"{value!r}"
        near = None
        if choices := _choices(option.type):
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"for example {example(option, place)}"
        raise ConfigError(f"{place}: expected {expected(option.type)}, got {shown}; {hint}") from error


def members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _choices(kind: Any) -> list[Any]:
    return [choice for member in members(kind) if get_origin(member) is Literal for choice in get_args(member)]


def expected(kind: Any) -> str:
    words = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "none",
        dict: "a mapping",
    }
    found = []
    for member in members(kind):
        origin = get_origin(member) or member
        if choices := _choices(member):
            found.append(" | ".join(str(choice) for choice in choices) if len(choices) == 1 else "one of " + ", ".join(map(str, choices)))
        elif origin in (list, tuple):
            inner = [a for a in get_args(member) if a is not Ellipsis]
            several = f"{len(inner)} numbers" if origin is tuple and set(inner) <= {int, float} else "a list"
            found.append(several if not inner or origin is tuple else f"a list of {expected(inner[0]).removeprefix('a ')}")
        else:
            found.append(words.get(origin, getattr(origin, "__name__", str(origin))))
    return " or ".join(found)


def help_text(config_class: type, usage: str) -> str:
    """The `--help` of a config: sections of one line per option with its type, meaning and default."""
    own = _section_of(config_class)
    sections: dict[str, list[Option]] = {name: [] for name in ("run", "model", "data", own)}
    for option in options(config_class).values():
        sections.setdefault(_section(option), []).append(option)
    width = max(len(_signature(option)) for group in sections.values() for option in group if len(_signature(option)) < 48)
    about = inspect.cleandoc(config_class.__doc__ or "").split("\n\n")[0]
    lines = [f"usage: {usage}", "", about, ""]
    lines += [f"  {'--config FILE.yaml':<{width}}  options from a YAML file; flags override it", ""]
    for name, group in sections.items():
        if group:
            lines += [f"{name}:", *(f"  {_signature(o):<{width}}  {_explained(o)}" for o in group), ""]
    return "\n".join(lines)


def _section(option: Option) -> str:
    if option.section:
        return option.section.replace(".", " ")
    named = next((name for name, fields in _SECTIONS.items() if option.name in fields), None)
    return named or _section_of(option.owner)


def _section_of(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower()


def _signature(option: Option) -> str:
    value = "true|false" if option.default is True else _placeholder(option.type)
    return f"--{option.name} {value}".rstrip()


def _explained(option: Option) -> str:
    named = option.name in ("model.path", "data.path", "output") and "empty:" not in option.help
    required = option.default is MISSING or (option.default == "" and named)
    default = "required" if required else f"default: {shown(option.default)}" if option.default not in ("", [], {}) else ""
    return " ".join(part for part in (option.help.removesuffix("."), f"({default})" if default else "") if part)


def _placeholder(kind: Any) -> str:
    words: dict[Any, str] = {float: "NUMBER", int: "INT", bool: "", str: "TEXT", Path: "PATH", dict: "MAP"}
    found = []
    for member in members(kind):
        origin = get_origin(member) or member
        if choices := _choices(member):
            found.append("|".join(str(choice) for choice in choices))
        elif origin in (list, tuple):
            found.append("LIST")
        elif member is not type(None):
            found.append(words.get(origin, "VALUE"))
    return "|".join(found)


def example(option: Option, place: str = "--") -> str:
    value = option.default
    if value in (MISSING, None, "", [], (), {}):
        kind = next((m for m in members(option.type) if m is not type(None)), str)
        samples: dict[Any, Any] = {float: 0.1, int: 8, bool: "true", list: "[a, b]", tuple: "[0.9, 0.99]", dict: "{a: 1}"}
        value = (_choices(kind) or [samples.get(get_origin(kind) or kind, "NAME")])[0]
    text = shown(value)
    return f"--{option.name} {text}" if place.startswith("--") else f"{option.name.rpartition('.')[2]}: {text}"


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else f"a {type(value).__name__}"
