"""Options from flags and YAML: what is accepted, what is refused and with which words, and the round trip of config.yaml."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from fastalign.errors import ConfigError, OutputError
from fastalign.models.config import ModelConfig
from fastalign.objectives.base import RunConfig
from fastalign.objectives.grpo import GRPOConfig
from fastalign.rollout.judging import JudgeConfig
from fastalign.train.config import dump, flat, given_options, load, parse, resume_config
from fastalign.train.options import help_text, nearest, notes, options


@dataclass
class Model:
    """Which model."""

    path: str = ""
    """Folder of the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights


@dataclass
class Config:
    """Options of `fastalign toy`."""

    name: ClassVar[str] = "toy"

    model: Model = field(default_factory=Model)
    output: str = ""
    resume: bool = False
    learning_rate: float = 1e-6
    """Peak rate, over
    two lines."""
    beta: float = 0.1
    batch_size: int = 8
    max_steps: int | None = None
    loggers: list[str] = field(default_factory=list)
    targets: list[str] | str = "all-linear"
    betas: tuple[float, float] = (0.9, 0.999)
    columns: dict[str, str] = field(default_factory=dict)
    log_every: int = 1


def message(argv: str, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv.split(), Config, **kwargs)  # type: ignore[arg-type]
    return str(caught.value)


def test_flags_reach_their_fields_with_their_types() -> None:
    argv = "--model.path m --learning-rate 1e-5 --beta=0.2 --batch_size 4 --resume --max_steps 7 --betas [0.8,0.9]"
    config = parse([*argv.split(), "--columns", "{prompt: question}"], Config)
    assert config == Config(Model("m"), "", True, 1e-5, 0.2, 4, 7, [], "all-linear", (0.8, 0.9), {"prompt": "question"})
    assert isinstance(config.betas, tuple)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--loggers wandb tensorboard", "loggers", ["wandb", "tensorboard"]),
        ("--loggers wandb,tensorboard", "loggers", ["wandb", "tensorboard"]),
        ("--loggers [wandb,tensorboard]", "loggers", ["wandb", "tensorboard"]),
        ("--loggers wandb", "loggers", ["wandb"]),
        ("--targets q_proj", "targets", "q_proj"),
        ("--targets q_proj,v_proj", "targets", ["q_proj", "v_proj"]),
        ("--max_steps none", "max_steps", None),
        ("--resume false", "resume", False),
        ("--beta -1", "beta", -1.0),  # a number is a value, not an option; the range is validate()'s matter
        ("--output 123", "output", "123"),
        ("--output none", "output", "none"),  # text that cannot be None stays text
        ("--beta 0.2 --beta 0.3", "beta", 0.3),  # the last one wins, as scripts that append flags expect
    ],
)
def test_value_forms(argv: str, name: str, value: object) -> None:
    assert flat(parse(argv.split(), Config))[name] == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--learning_rat 1", "unknown option --learning_rat; did you mean --learning_rate?"),
        ("--path m", "unknown option --path; did you mean --model.path?"),
        ("--model.dtyp auto", "did you mean --model.dtype?"),
        ("--modl.path m", "did you mean --model.path?"),
        ("--lr 1", "did you mean --learning_rate?"),
        ("--per_device_train_batch_size 1", "did you mean --batch_size?"),
        ("--zzzzzz 1", "unknown option --zzzzzz; --help lists every option"),
        ("--model m", "--model is a group of options, not one option; did you mean --model.path, --model.dtype?"),
        ("--beta abc", "--beta: expected a number, got 'abc'; for example --beta 0.1"),
        ("--beta true", "--beta: expected a number, got 'true'"),
        ("--beta nan", "--beta: expected a number, got 'nan'"),
        ("--batch_size 1.5", "--batch_size: expected a whole number, got '1.5'; for example --batch_size 8"),
        ("--max_steps many", "--max_steps: expected a whole number or none, got 'many'"),
        ("--resume maybe", "--resume: expected true or false, got 'maybe'; for example --resume false"),
        ("--model.dtype float23", "--model.dtype: expected one of auto, float32, bfloat16, got 'float23'; did you mean float32?"),
        ("--betas [1,2,3]", "--betas: expected 2 numbers, got '[1,2,3]'"),
        ("--columns 7", "--columns: expected a mapping, got '7'"),
        ("--beta", "--beta needs a value: a number; for example --beta 0.1"),
        ("--beta 1 2", "--beta takes one value, got '1 2'"),
        ("run.yaml", "unexpected argument 'run.yaml'; options start with two dashes"),
        ("-x", "unexpected argument '-x'"),
        ("--config", "--config needs a YAML file"),
        ("--config nowhere.yaml", "nowhere.yaml: cannot read the config file (No such file or directory)"),
    ],
)
def test_mistakes_are_named_with_their_remedy(argv: str, words: str) -> None:
    assert words in message(argv)


def test_flags_override_files_and_later_files_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("beta: 0.5\nbatch-size: 2\nmodel:\n  path: a\n  dtype: float32\nlearning_rate: 1e-5\n")
    second.write_text("model.path: b\nbeta: 0.6\nmodel:\n#  dtype: auto\n")
    config = parse(["--config", str(first), "--config", str(second), "--beta", "0.7"], Config)
    assert (config.beta, config.batch_size, config.model, config.learning_rate) == (0.7, 2, Model("b", "float32"), 1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bta: 1", "option bta is unknown; did you mean beta?"),
        ("model:\n  pth: x", "option model.pth is unknown; did you mean model.path?"),
        ("model: x", "option model is a group of options, not one option; did you mean model.path, model.dtype?"),
        ("beta: [1]", "beta: expected a number, got [1]; for example beta: 0.1"),
        ("beta: yes", "beta: expected a number, got True"),
        ("beta:", "beta: expected a number, got nothing"),
        ("output: 12", "output: expected text, got 12; for example output: NAME"),
        ("loggers: [1]", "loggers: expected a list of text, got [1]"),
        ("beta: 1\nbeta: 2", ":2: not valid YAML: key 'beta' is given twice"),
        ("beta: [1", "not valid YAML"),
        ("- beta", "expected 'option: value' lines, got a list"),
        ("just words", "got text; for example 'beta: 0.1'"),
        ("beta: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
    ],
)
def test_mistakes_in_yaml_name_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    error = message(f"--config {path}")
    assert words in error
    assert error.startswith(str(path))


def test_yaml_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"beta: \xff\n")
    assert f"{path}: not UTF-8 text (byte 6)" in message(f"--config {path}")


def test_nothing_in_a_file_is_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("open('ran', 'w')\ndef f(): pass\nclass C: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("columns: {class_path: evil.C, init_args: x}\noutput: '!!python/name:evil.f'\n")
    config = parse(["--config", str(path)], Config)
    assert config.columns == {"class_path": "evil.C", "init_args": "x"}  # plain text, as typed
    assert not (tmp_path / "ran").exists()


def test_resolved_config_round_trips(tmp_path: Path) -> None:
    config = Config(Model("é: 'q' #1"), "run", False, 1e-6, 1 / 3, 8, None, ["a"], ["q"], (0.5, 0.25), {"prompt": "yes"}, 2)
    dump(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", Config) == config
    assert os.listdir(tmp_path) == ["config.yaml"]  # no temporary file is left


def test_resume_is_an_action_and_not_written(tmp_path: Path) -> None:
    dump(Config(resume=True), tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", Config).resume is False


def test_dump_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        dump(Config(), tmp_path / "no" / "config.yaml")


def test_resume_takes_the_run_and_what_may_change(tmp_path: Path) -> None:
    dump(Config(Model("m"), output="old", beta=0.3), tmp_path / "config.yaml")
    config = resume_config(["--resume", "--output", str(tmp_path), "--log_every", "5", "--beta", "0.3"], Config, tmp_path)
    assert config == Config(Model("m"), output=str(tmp_path), beta=0.3, resume=True, log_every=5)
    with pytest.raises(ConfigError) as caught:
        resume_config(["--resume", "--beta", "0.4"], Config, tmp_path)
    assert "--beta 0.4 contradicts the run in" in str(caught.value)
    assert "which has 0.3" in str(caught.value)


def test_code_that_a_run_folder_names_is_named_again_to_resume(tmp_path: Path) -> None:
    rewards = ["numeric_match", "soft_overlong:8:4", "mine.py:good"]
    run = GRPOConfig(ModelConfig("m", trust_remote_code=True), output="old", rewards=rewards, judge=JudgeConfig(function="my.judge:rate"))
    dump(run, tmp_path / "config.yaml")
    with pytest.raises(ConfigError) as caught:
        resume_config(["--resume"], GRPOConfig, tmp_path)
    words = shlex.split(str(caught.value).partition("to resume add ")[2])
    assert words[::2] == ["--model.trust_remote_code", "--rewards", "--judge.function"]
    assert resume_config(["--resume", *words], GRPOConfig, tmp_path) == replace(run, resume=True)
    for left in range(0, len(words), 2):
        with pytest.raises(ConfigError, match=f"config.yaml: {words[left][2:]} names code of yours"):
            resume_config(["--resume", *words[:left], *words[left + 2 :]], GRPOConfig, tmp_path)
    dump(GRPOConfig(output="old", rewards=rewards[:2]), tmp_path / "config.yaml")
    assert resume_config(["--resume"], GRPOConfig, tmp_path).rewards == rewards[:2]


def test_options_of_one_process_are_refused_for_several() -> None:
    GRPOConfig().check_ranks(4)
    for option, value in {"optimizer": "adamw_8bit", "update_in_backward": True}.items():
        GRPOConfig(**{option: value}).check_ranks(1)
        with pytest.raises(ConfigError, match=rf"{option} {value} is of one process, and there are 2, .*; set --{option} (adamw|false)$"):
            GRPOConfig(**{option: value}).check_ranks(2)


def test_given_options_has_no_defaults() -> None:
    assert given_options(["--beta", "0.2", "--config", "unread.yaml"], Config) == {"beta": 0.2}


@dataclass
class Outer:
    """A required option and a section that may be absent."""

    path: str
    model: Model | None = None


def test_required_options_and_absent_sections() -> None:
    with pytest.raises(ConfigError, match=r"missing option --path \(text\)"):
        parse([], Outer)
    assert parse(["--path", "x"], Outer).model is None
    assert parse(["--path", "x", "--model.path", "m"], Outer).model == Model("m")


def test_help_has_one_line_for_every_option() -> None:
    text = help_text(Config, "fastalign toy [options]")
    lines = text.splitlines()
    assert lines[0] == "usage: fastalign toy [options]"
    for name in options(Config):
        assert sum(line.split()[:1] == [f"--{name}"] for line in lines) == 1, name
    rate = next(line for line in lines if "--learning_rate" in line)
    assert "NUMBER" in rate
    assert rate.endswith("Peak rate, over two lines (default: 1e-06)")
    assert "auto|float32|bfloat16" in text
    assert max(map(len, lines)) <= 140


def test_notes_come_from_comment_or_string() -> None:
    assert notes(Model) == {"path": "Folder of the model.", "dtype": "of the weights"}
    assert notes(Config)["beta"] == ""


def test_nearest_gives_up_on_noise() -> None:
    assert nearest("qqqq", ["alpha", "beta"]) is None


def test_every_option_of_dpo_has_help_and_a_section() -> None:
    from fastalign.objectives.dpo import DPOConfig
    from fastalign.train.options import _SECTIONS

    table = options(DPOConfig)
    assert [name for name, option in table.items() if not option.help] == []
    listed = {name for names in _SECTIONS.values() for name in names}
    assert listed <= set(table)  # no section names an option that is gone
    own = {name for name, option in table.items() if option.owner is DPOConfig}
    assert {name for name, option in table.items() if not option.section} == listed | own
    text = help_text(DPOConfig, "fastalign dpo")
    section = text.split("\ndpo:\n")[1].split("\n\n")[0]
    every = {field.name for field in fields(RunConfig)}
    assert set(re.findall(r"^  --(\S+)", section, re.M)) == {name for name in own if name not in every}


def test_dpo_config_round_trips(tmp_path: Path) -> None:
    from fastalign.objectives.dpo import DPOConfig

    argv = "--model.path m --data.path d.jsonl --output r --beta 0.2 --lora.r 8 --data.max_length none"
    config = parse(argv.split(), DPOConfig)
    assert (config.beta, config.lora.r, config.data.max_length) == (0.2, 8, None)
    dump(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", DPOConfig) == config
