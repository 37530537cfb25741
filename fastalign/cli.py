"""The `fastalign` command. Heavy imports wait until a subcommand needs them, so that help and mistakes answer at once."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from fastalign import __version__
from fastalign.errors import ConfigError, FastalignError, RankError

# Algorithm -> where its config dataclass lives. `fastalign NAME` trains with it.
ALGORITHMS = {
    "sft": ("fastalign.objectives.sft", "SFTConfig"),
    "reward": ("fastalign.objectives.reward", "RewardConfig"),
    "dpo": ("fastalign.objectives.dpo", "DPOConfig"),
    "distill": ("fastalign.objectives.distill", "DistillConfig"),
    "kto": ("fastalign.objectives.kto", "KTOConfig"),
    "orpo": ("fastalign.objectives.orpo", "ORPOConfig"),
    "cpo": ("fastalign.objectives.cpo", "CPOConfig"),
    "simpo": ("fastalign.objectives.cpo", "SimPOConfig"),
    "grpo": ("fastalign.objectives.grpo", "GRPOConfig"),
    "rloo": ("fastalign.objectives.rloo", "RLOOConfig"),
    "reinforce_pp": ("fastalign.objectives.reinforce_pp", "ReinforcePPConfig"),
    "ppo": ("fastalign.objectives.ppo", "PPOConfig"),
    "online_dpo": ("fastalign.objectives.online_dpo", "OnlineDPOConfig"),
    "gkd": ("fastalign.objectives.gkd", "GKDConfig"),
}

HELP = """\
usage: fastalign COMMAND [options]

Trains language models on texts, preferences and rewards. Every command explains itself: fastalign COMMAND --help

  sft          train on texts, conversations or completions: --model.path DIR --data.path FILE --output RUN
  reward       train a reward model on pairs or rankings: --model.path DIR --data.path FILE --output RUN
  dpo          train on preference pairs (DPO and 14 of its kind): --model.path DIR --data.path FILE --output RUN
  kto          train on single answers that are desirable or not: --model.path DIR --data.path FILE --output RUN
  orpo, cpo, simpo   train on preference pairs without a reference: --model.path DIR --data.path FILE --output RUN
  distill      learn a teacher's distributions on texts: --model.path DIR --teacher.path DIR --data.path FILE --output RUN
  grpo, rloo   train on the model's own answers to prompts, by reward functions: --model.path DIR --data.path FILE --rewards NAMES ...
  reinforce_pp the same with advantages of tokens, whitened over all answers (REINFORCE++): ... --rewards NAMES [--baseline true]
  ppo          the same with a critic, which judges every token of an answer: --model.path DIR --data.path FILE --rewards NAMES ...
  online_dpo   prefer the better of the model's own answers, by reward functions or a judge: ... --rewards NAMES or --judge.function NAME
  gkd          learn a teacher's distributions on the model's own answers: --model.path DIR --teacher.path DIR --data.path FILE ...
  eval         accuracy and margins on held-out pairs, perplexity of texts, calibration of rewards: --model.path RUN --data.path FILE
  label FILE   let a judge score completions: a function, or a model behind an OpenAI-compatible endpoint
  plan         memory and arithmetic of a run before it starts, and what fits: --objective dpo --model.path DIR [options of the run]
  report RUN   write RUN/report.html and its curves again
  data check FILE   validate a data file and show rendered samples with the loss mask in colour
  data convert IN OUT   turn ratings, pairs, labels, rankings or edits into training data: --from ratings --to pairs
  migrate TRAINER FILE   turn a config of TRL's into one of ours, and list what could not be carried over: migrate dpo trl.yaml
  serve        answer over HTTP (OpenAI's protocol and a page to chat with), and keep the answers and the feedback on them:
               --model DIR [--data feedback.db]; serve token add --role user makes a token
  online       learn from that feedback, round by round: --serve http://127.0.0.1:8000 [--config loop.yaml]
  demo         build a small model, train it on generated preferences and show before and after

  --version    print the version
  --debug      with any command: show the traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for an error that is explained on stderr, 130 when interrupted.

    Of several processes that torchrun started, 3 for one that ends since another one failed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    log = logging.getLogger("fastalign")
    if not log.handlers:
        log.addHandler(_Messages())
        log.setLevel(logging.INFO)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except RankError as error:
        print(f"{_speaker()}error: {error}", file=sys.stderr)
        return 3
    except FastalignError as error:
        if debug:
            traceback.print_exc()
        print(f"{_speaker()}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `fastalign ... | head`; keep the exit handlers quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Messages(logging.Handler):
    """What the package logs, as plain lines on the stderr of the moment (a progress bar replaces it while it is drawn)."""

    def emit(self, record: logging.LogRecord) -> None:
        if _rank() and record.levelno < logging.ERROR:  # the first process speaks for all
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{_speaker()}{prefix}{record.getMessage()}", file=sys.stderr)


def _rank() -> int:
    """The number of this process among those that torchrun started; 0 of one alone."""
    return int(os.environ.get("RANK", "0"))


def _speaker() -> str:
    return f"rank {_rank()}: " if _rank() else ""


def entry() -> None:
    """Console script."""
    sys.exit(main())


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"fastalign {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command in ALGORITHMS:
        return _train(command, rest)
    commands: dict[str, Callable[[list[str]], int]] = {
        "eval": _eval, "label": _label, "plan": _plan, "report": _report, "data": _data, "migrate": _migrate, "serve": _serve,
        "online": _online, "demo": _demo,
    }  # fmt: skip
    if command not in commands:
        from fastalign.train.options import nearest

        near = nearest(command, [*ALGORITHMS, *commands])
        raise ConfigError(f"unknown command {command!r}; " + (f"did you mean {near}?" if near else "fastalign --help lists all"))
    return commands[command](rest)


def _train(name: str, argv: list[str]) -> int:
    from fastalign.train.config import given_options, parse, resume_config

    module, class_name = ALGORITHMS[name]
    config_class: Any = getattr(import_module(module), class_name)
    if _wants_help(argv):
        return _print_help(config_class, f"fastalign {name} --model.path DIR --data.path FILE --output RUN [options]")
    flags = given_options(argv, config_class)
    resumed = Path(flags["output"]) if flags.get("resume") and flags.get("output") else None
    if resumed and (resumed / "config.yaml").is_file():
        config = resume_config(argv, config_class, resumed)
    elif resumed and "model.path" not in flags and not any(word.startswith("--config") for word in argv):
        raise ConfigError(f"--resume: {resumed} has no config.yaml, so there is no run to resume; check --output")
    else:
        config = parse(argv, config_class)
    _no_foreign_bars()
    result = import_module("fastalign.train.loop").train(config)
    if result.interrupted:
        return 128 + int(signal.Signals[result.interrupted])
    if _rank():
        return 0
    from fastalign.train.metrics import summary

    for metrics in filter(None, (result.metrics, result.eval_metrics)):
        print(f"step {result.step}  {summary(metrics)}")
    print(f"model   {result.output / 'final'}\nreport  {result.output / 'report.html'}")
    return 0


def _eval(argv: list[str]) -> int:
    from fastalign.train.config import parse
    from fastalign.train.evaluate import EvalConfig, evaluate, show

    if _wants_help(argv):
        return _print_help(EvalConfig, "fastalign eval --model.path DIR_OR_RUN --data.path FILE [--reference DIR] [options]")
    config = parse(argv, EvalConfig)
    _no_foreign_bars()
    show(evaluate(config))
    return 0


def _label(argv: list[str]) -> int:
    from fastalign.train.config import parse
    from fastalign.train.label import LabelConfig, label, show

    if _wants_help(argv):
        return _print_help(LabelConfig, "fastalign label ROWS.jsonl --output JUDGED.jsonl --judge.* [options]")
    config = parse(["--path", *argv] if argv and not argv[0].startswith("--") else argv, LabelConfig)
    show(label(config), config)
    return 0


@dataclass
class PlanConfig:
    """Predicts the memory of a training run from its options and the model's config.json alone, and what fits on which device.

    All options of the objective count too: fastalign OBJECTIVE --help. Data and output need not be named.
    """

    objective: str = "dpo"  # what is to be trained: sft, reward, dpo, orpo, cpo, simpo, kto, grpo or rloo
    scored: float = 1.0  # share of the tokens that are scored: completions, not prompts
    ranks: int = 1  # processes of the run, as torchrun starts them; the memory is that of each
    tflops: float | None = None  # TFLOP/s that the device reaches, in place of measuring the one at hand (a run with --profile 2 says)


def _plan(argv: list[str]) -> int:
    from fastalign.train.config import parse
    from fastalign.train.options import nearest

    if _wants_help(argv):
        return _print_help(
            PlanConfig, "fastalign plan --objective NAME --model.path DIR [--scored SHARE] [--ranks N] [--tflops X] [options of the run]"
        )
    own: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        mine = word.partition("=")[0] in ("--objective", "--scored", "--ranks", "--tflops")
        (own if mine else rest).append(word)
        if mine and "=" not in word and words:
            own.append(words.pop(0))
    options = parse(own, PlanConfig)
    if options.objective not in ALGORITHMS:
        near = nearest(options.objective, ALGORITHMS)
        raise ConfigError(f"objective {options.objective!r} is not known; " + (f"did you mean {near}?" if near else ", ".join(ALGORITHMS)))
    if options.tflops is not None and not options.tflops > 0:
        raise ConfigError(f"tflops must be positive, got {options.tflops}")
    module, class_name = ALGORITHMS[options.objective]
    config = parse(rest, getattr(import_module(module), class_name))
    config.output, config.data.path = config.output or "run", config.data.path or "data.jsonl"  # neither is looked at
    config.validate()
    from rich.console import Console

    planning = import_module("fastalign.train.plan")
    _no_foreign_bars()
    outlook = planning.plan(config, scored=options.scored, timed=options.tflops is None, ranks=options.ranks)
    planning.show(config, outlook, Console(), tflops=options.tflops)
    return 0


def _report(argv: list[str]) -> int:
    usage = "usage: fastalign report RUN    writes RUN/report.html and RUN/report/*.png from RUN/metrics.jsonl"
    if _wants_help(argv):
        print(usage)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ConfigError(f"report takes the folder of one run, got {' '.join(argv) or 'nothing'!r}; {usage}")
    from fastalign.train.report import write_report

    print(write_report(Path(argv[0])))
    return 0


def _data(argv: list[str]) -> int:
    commands = {"check": _data_check, "convert": _data_convert}
    if not argv or _wants_help(argv[:1]):
        print("\n".join(f"usage: {usage}" for usage in (_CHECK_USAGE, _CONVERT_USAGE)))
        return 0
    if argv[0] not in commands:
        from fastalign.train.options import nearest

        near = nearest(argv[0], commands)
        raise ConfigError(f"unknown command data {argv[0]!r}; " + (f"did you mean data {near}?" if near else "there are check and convert"))
    return commands[argv[0]](argv[1:])


def _serve(argv: list[str]) -> int:
    service = import_module("fastalign.serve.service")
    if _wants_help(argv):
        groups = {"token": (service.TokenConfig, "token add|list|revoke"), "rollback": (service.RollbackConfig, "rollback")}
        config_class, usage = groups.get(argv[0], (service.ServeConfig, "--model DIR [options]   (also: serve token, serve rollback)"))
        return _print_help(config_class, f"fastalign serve {usage}")
    _no_foreign_bars()
    return service.command(argv)


def _online(argv: list[str]) -> int:
    from fastalign.train.config import parse

    config_class = import_module("fastalign.serve.loop.config").OnlineConfig
    if _wants_help(argv):
        return _print_help(config_class, "fastalign online --serve URL|DATABASE [--config loop.yaml] [options]")
    config = parse(argv, config_class)
    _no_foreign_bars()
    return int(import_module("fastalign.serve.loop.loop").online(config))


_CHECK_USAGE = "fastalign data check FILE [--objective NAME] [--model.path DIR] [--data.* options]"
_CONVERT_USAGE = "fastalign data convert IN OUT --from ratings|pairs|binary|listwise|edits --to pairs|binary|listwise [options]"


def _data_check(argv: list[str]) -> int:
    from fastalign.data.check import AnyDataConfig, check
    from fastalign.models.config import ModelConfig
    from fastalign.train.config import parse

    @dataclass
    class CheckConfig:
        """Validates every row of a data file. With --model.path it also tokenizes, and shows samples with their loss mask in colour."""

        data: AnyDataConfig = field(default_factory=AnyDataConfig)
        model: ModelConfig = field(default_factory=ModelConfig)
        objective: str = ""  # what is to be trained: sft, reward, dpo, kto, ...; empty: what the first row looks like
        samples: int = 3  # samples to show

    if _wants_help(argv):
        return _print_help(CheckConfig, _CHECK_USAGE)
    config = parse(["--data.path", *argv] if argv and not argv[0].startswith("--") else argv, CheckConfig)
    if not config.data.path:
        raise ConfigError(f"data check needs a file; usage: {_CHECK_USAGE}")
    from rich.console import Console

    from fastalign.data.tokenizer import load_tokenizer

    data = config.data.of(config.objective)
    tokenizer = load_tokenizer(config.model.path, chat_template=data.chat_template) if config.model.path else None
    return check(data, tokenizer, Console(), config.samples)


def _data_convert(argv: list[str]) -> int:
    from fastalign.data.convert import ConvertConfig, convert
    from fastalign.train.config import parse

    if _wants_help(argv):
        return _print_help(ConvertConfig, _CONVERT_USAGE, {"--from_": "--from "})
    names = [word for word in argv[:2] if not word.startswith("--")]
    options = [word.replace("--from", "--from_", 1) if word.partition("=")[0] == "--from" else word for word in argv[len(names) :]]
    given = [word for option, name in zip(("--data.path", "--output"), names) for word in (option, name)]
    config = parse([*given, *options], ConvertConfig)
    statistics = convert(config, progress=sys.stderr.isatty())
    print(f"{statistics.summary()}\n" + "\n".join(str(path) for path in (*config.outputs, config.page)))
    return 0


def _migrate(argv: list[str]) -> int:
    from fastalign.train.config import parse
    from fastalign.train.migrate import MigrateConfig, write

    if _wants_help(argv):
        return _print_help(MigrateConfig, "fastalign migrate TRAINER FILE [--output NEW.yaml] [--overwrite]")
    names = [word for word in argv[:2] if not word.startswith("--")]
    given = [word for option, name in zip(("--trainer", "--path"), names) for word in (option, name)]
    config = parse([*given, *argv[len(names) :]], MigrateConfig)
    config.validate()
    module, class_name = ALGORITHMS[config.trainer]
    print(f"{write(config, getattr(import_module(module), class_name)).report()}\n{config.target}")
    return 0


@dataclass
class DemoConfig:
    """Builds a small model and tokenizer from nothing, trains it on generated data, and shows before and after."""

    objective: str = "dpo"
    """What to show: sft, reward, dpo, orpo, cpo, simpo, kto, distill, gkd, grpo, rloo, reinforce_pp, ppo, online_dpo, or online (a
    model that is served, judged and trained in turn)."""
    output: str = "demo"  # folder for the model, the data and the run


def _demo(argv: list[str]) -> int:
    from fastalign.train.config import parse

    if _wants_help(argv):
        return _print_help(DemoConfig, "fastalign demo [--objective NAME] [--output DIR]")
    config = parse(argv, DemoConfig)
    _no_foreign_bars()
    import_module("fastalign.demo").run(config.objective, config.output)
    return 0


def _no_foreign_bars() -> None:
    """Transformers draws a bar for each file that it reads or writes, over ours and into log files."""
    import_module("transformers.utils.logging").disable_progress_bar()


def _wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _print_help(config_class: type, usage: str, spelled: Mapping[str, str] | None = None) -> int:
    """Prints the options; `spelled` gives the spelling of those whose name is a word of Python."""
    from fastalign.train.options import help_text

    text = help_text(config_class, usage)
    for name, spelling in (spelled or {}).items():
        text = text.replace(name, spelling)
    print(text)
    return 0
