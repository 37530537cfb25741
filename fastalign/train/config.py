"""Options of a run, read from YAML files and flags into nested dataclasses, and written back as the resolved `config.yaml`.

The dataclasses are the only definition: a field is the option `--section.name`, its default the option's default, and the
comment on its line (or the string under it) the option's help. Types are checked by jsonargparse; YAML is loaded safely,
and nothing that a file says is ever imported or called.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from fastalign.errors import ConfigError
from fastalign.objectives.base import RunConfig
from fastalign.train.folder import writing
from fastalign.train.options import Option, convert, default_of, example, expected, kind_of, members, nearest, nested_class, options

Config = TypeVar("Config")

# A resumed run may change these and nothing else: none of them touches the model, the data or their order.
RESUME_MAY_CHANGE = frozenset(
    {"output", "resume", "overwrite", "loggers", "log_every", "eval_every", "save_every", "keep_checkpoints", "profile", "model.device"}
    | {"parallel.shard", "parallel.replicas", "parallel.head"}
    | {f"vllm.{name}" for name in ("url", "model", "adapter_folder", "api_key_env", "timeout", "retries", "workers")}
    | {f"vllm_local.{name}" for name in ("gpu_memory_utilization", "sleep", "enforce_eager", "folder")}
)


def parse(argv: Sequence[str], config_class: type[Config], *, base: Path | None = None) -> Config:
    """The config that `argv` asks for. Flags override `--config` files, later files earlier ones, and all of them `base`.

    Raises ConfigError for an unknown, ill-typed or missing option; the message names the flag or the file and key.
    """
    table = options(config_class)
    files, flags = _read_flags(argv, table)
    given: dict[str, Any] = {}
    for path in [*([base] if base else []), *files]:
        given.update(_read_yaml(path, table))
    given.update(flags)
    if missing := [o.name for o in table.values() if o.default is MISSING and o.name not in given]:
        raise ConfigError(f"missing option --{missing[0]} ({table[missing[0]].help or expected(table[missing[0]].type)})")
    return _build(config_class, "", given, MISSING)


def load(path: Path | str, config_class: type[Config]) -> Config:
    """Read one YAML file, such as the `config.yaml` of a run."""
    return parse([], config_class, base=Path(path))


def dump(config: Any, path: Path | str) -> None:
    """Write every option, defaults included, as YAML that `load` turns back into an equal config; whole or not at all.

    `resume` and `overwrite` are what one command line did to the folder, not what the run is: they are written as false.
    """
    path = Path(path)
    content = _plain(dataclasses.asdict(config))
    content |= {name: False for name in ("resume", "overwrite") if name in content}
    text = f"# Every option of this run, resolved. Train again from it: fastalign {config.name} --config {path.name} --output NEW\n"
    write_text(path, text + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` durably, in one step. Raises OutputError when the disk refuses; then the old file stays."""
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def resume_config(argv: Sequence[str], config_class: type[Config], run: Path) -> Config:
    """The config of the run in `run`, with what `argv` may still change (RESUME_MAY_CHANGE).

    Raises ConfigError when `argv` contradicts the run: a resumed run is the same run; and when the run's folder names code that
    `argv` does not: a folder, which may be a stranger's, gets none to run.
    """
    saved = run / "config.yaml"
    config = parse(argv, config_class, base=saved)
    _check_named(argv, config, run)
    before, after = flat(load(saved, config_class)), flat(config)
    if after.get("max_tokens") == "auto":  # the run has settled on a number
        config.max_tokens = after["max_tokens"] = before["max_tokens"]  # type: ignore[attr-defined]
    if after.get("model.gradient_checkpointing") == "auto":
        for option in ("gradient_checkpointing", "checkpoint_keep"):
            after[f"model.{option}"] = before[f"model.{option}"]
            setattr(config.model, option, before[f"model.{option}"])  # type: ignore[attr-defined]
    for name, value in after.items():
        if name not in RESUME_MAY_CHANGE and value != before[name]:
            raise ConfigError(
                f"--{name} {value} contradicts the run in {run}, which has {before[name]}; "
                f"leave it out to resume, or start a new run with another --output"
            )
    return config


def _check_named(argv: Sequence[str], config: Any, run: Path) -> None:
    code: dict[str, str | list[str]] = config.named_code() if isinstance(config, RunConfig) else {}
    table = options(type(config))
    files, flags = _read_flags(argv, table)
    named = {*flags, *(name for file in files for name in _read_yaml(file, table))}
    if left := {name: value for name, value in code.items() if name not in named}:
        names = ", ".join(
            f"{name} names code of yours ({value if isinstance(value, str) else ', '.join(value)})" for name, value in left.items()
        )
        words = " ".join(f"--{name} {value if isinstance(value, str) else shlex.quote(json.dumps(value))}" for name, value in left.items())
        raise ConfigError(f"{run / 'config.yaml'}: {names}, which runs only where you name it yourself; to resume add {words}")


def from_mapping(content: dict[str, Any], config_class: type[Config], where: str) -> Config:
    """The config of a mapping like that of a YAML file; errors begin with `where`. Raises ConfigError as `parse` does."""
    table = options(config_class)
    return _build(config_class, "", _converted(content, table, where), MISSING)


def given_options(argv: Sequence[str], config_class: type) -> dict[str, Any]:
    """The flags in `argv`, checked and converted, without defaults and without reading any file."""
    return _read_flags(argv, options(config_class))[1]


def flat(config: Any) -> dict[str, Any]:
    """Dotted option name -> value, for tables and comparisons."""
    found: dict[str, Any] = {}

    def visit(value: Any, prefix: str) -> None:
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if dataclasses.is_dataclass(item):
                visit(item, f"{prefix}{field.name}.")
            else:
                found[prefix + field.name] = item

    visit(config, "")
    return found


def _read_flags(argv: Sequence[str], table: dict[str, Option]) -> tuple[list[Path], dict[str, Any]]:
    files: list[Path] = []
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; options start with two dashes, as in --output run")
        name, equals, text = word[2:].partition("=")
        values = [text] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        name = name.replace("-", "_")
        if name == "config":
            if not values:
                raise ConfigError("--config needs a YAML file, as in --config run.yaml")
            files += [Path(value) for value in values]
        else:
            option = _find(name, table, "option --")
            given[option.name] = convert(option, _flag_value(option, values), f"--{option.name}")
    return files, given


def _flag_value(option: Option, values: list[str]) -> Any:
    if not values:
        if bool in members(option.type):
            return True
        raise ConfigError(f"--{option.name} needs a value: {expected(option.type)}; for example {example(option)}")
    if option.is_list:
        if len(values) > 1:
            return values
        if not values[0].startswith("[") and ("," in values[0] or not option.takes_text):
            return [part.strip() for part in values[0].split(",") if part.strip()]
    if len(values) > 1:
        raise ConfigError(f"--{option.name} takes one value, got {' '.join(values)!r}; for example {example(option)}")
    optional_word = values[0].lower() in ("none", "null") and type(None) in members(option.type)
    return None if optional_word else values[0]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where plain YAML silently keeps the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file maps, {} of an empty one. Raises ConfigError for a file that is no mapping, or has a key twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'option: value' lines, got {kind_of(content)}; for example 'beta: 0.1'")
    return content


def _read_yaml(path: Path, table: dict[str, Option]) -> dict[str, Any]:
    return _converted(read_mapping(path), table, str(path))


def _converted(content: dict[Any, Any], table: dict[str, Option], where: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in _flatten(content, table, ""):
        option = _find(name, table, f"{where}: option ")
        given[option.name] = convert(option, value, f"{where}: {option.name}")
    return given


def _flatten(content: dict[Any, Any], table: dict[str, Option], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}".replace("-", "_")
        section = any(other.startswith(f"{name}.") for other in table)
        if value is None and section:  # a heading whose options are all commented out
            continue
        if isinstance(value, dict) and name not in table:
            yield from _flatten(value, table, f"{name}.")
        else:
            yield name, value


def _find(name: str, table: dict[str, Option], label: str) -> Option:
    if name in table:
        return table[name]
    dashes = "--" if label.endswith("--") else ""
    if inside := [other for other in table if other.startswith(f"{name}.")]:
        shown = ", ".join(dashes + other for other in inside[:4])
        raise ConfigError(f"{label}{name} is a group of options, not one option; did you mean {shown}?")
    near = nearest(name, table)
    remedy = f"did you mean {dashes}{near}?" if near else "--help lists every option"
    raise ConfigError(f"unknown {label}{name}; {remedy}" if dashes else f"{label}{name} is unknown; {remedy}")


def _build(cls: type[Config], prefix: str, given: dict[str, Any], defaults: Any) -> Config:
    """`cls` from the given options, every other field from `defaults` (an instance that holds the section's own defaults)."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = prefix + field.name
        default = default_of(field) if defaults is MISSING or defaults is None else getattr(defaults, field.name)
        if nested := nested_class(hints[field.name]):
            wanted = any(other.startswith(f"{name}.") for other in given)
            values[field.name] = _build(nested, f"{name}.", given, default) if wanted or default is not None else None
        else:
            values[field.name] = given.get(name, default)
    return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
