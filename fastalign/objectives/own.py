"""Losses of the user's own: found by the name that the user gave, checked before a run begins, and called like ours.

    preference   f(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, options) -> losses, each (P,)
    policy       f(logps, old_logps, advantages, *, options) -> losses, each (N,)

Options are given by name where the signature has them: those of the run, and `loss_options`. Every loss is tried on a few numbers:
it must have the shape that it should have, a gradient, and depend on no more than it declares (`losses.own_loss`), because the
schedule of the head, and that a step does not depend on how it is cut, rest on that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastalign.errors import ConfigError, LossError
from fastalign.losses.own import AGGREGATES, declared
from fastalign.losses.policy import PolicyLoss
from fastalign.rollout.functions import fingerprint, load_callable
from fastalign.types import PreferenceLoss

OPTION = "loss_type"
PAIR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
TOKEN = ("logps", "old_logps", "advantages")
LENGTHS = ("chosen_lengths", "rejected_lengths")


def is_own(name: str) -> bool:
    """Whether `name` is MODULE:FUNCTION or FILE.py:FUNCTION, and not one of our losses."""
    return ":" in name


def choices(kind: Any) -> tuple[str, ...]:
    """The words of a type of which one member is a Literal."""
    return tuple(word for member in (kind, *get_args(kind)) for word in get_args(member) if isinstance(word, str))


def digests(*names: str) -> dict[str, str]:
    """What of the run is code of the user's own, and of which source: {} for losses of ours."""
    return {f"source of {OPTION} {name}": fingerprint(name, load(name)) for name in names if is_own(name)}


def load(name: str) -> Callable[..., Any]:
    """The user's function; a file is run again only when it has changed. Raises ConfigError."""
    where = Path(name.rpartition(":")[0])
    return _load(name, where.read_bytes() if where.suffix == ".py" and where.is_file() else b"")


@lru_cache(maxsize=32)
def _load(name: str, content: bytes) -> Callable[..., Any]:
    return load_callable(name, OPTION)


@dataclass(frozen=True)
class OwnPairLoss:
    """A preference loss of the user's, called as those of `losses.preference` are."""

    name: str
    function: Callable[..., Any]
    couples: str
    takes: frozenset[str]  # the options that its signature has
    options: Mapping[str, Any]

    @property
    def takes_lengths(self) -> bool:
        return self.takes.issuperset(LENGTHS)

    def __call__(self, *logps: Tensor, **known: Tensor) -> PreferenceLoss:
        """Each (P,); rewards are 0, the objective has its own. Raises LossError."""
        found = _call(self.name, self.function, logps, {**self.options, **known})
        loss = found.loss if isinstance(found, PreferenceLoss) else found
        _check_shape(self.name, loss, logps[0], "pair", "P")
        return PreferenceLoss(loss, *(torch.zeros_like(loss.detach()) for _ in range(2)))


def pair_loss(name: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> OwnPairLoss:
    """The preference loss `name` with what it takes of `given`, the run's options, and with `options`, those of its own; tried.

    Raises ConfigError where it is not there, has another signature, or couples more than it declares; LossError where it fails.
    """
    function, says = load(name), declared(load(name))
    takes = _takes(name, function, PAIR, {*given, *LENGTHS, *options})
    for what in ("aggregate", "level"):
        if getattr(says, what) is not None:
            raise ConfigError(f"{OPTION} {name}: own_loss({what}=...) is of policy losses; a preference loss declares couples alone")
    if len(missing := [length for length in LENGTHS if length in takes]) == 1:
        raise ConfigError(f"{OPTION} {name}: {' and '.join(LENGTHS)} go together, its signature has {missing[0]} alone")
    _check_options(name, options, takes, given, LENGTHS)
    chosen = {option: value for option, value in {**given, **options}.items() if option in takes}
    loss = OwnPairLoss(name, function, says.couples or "pair", frozenset(takes), chosen)
    _try_pairs(loss)
    return loss


def policy_loss(name: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[PolicyLoss, dict[str, Any]]:
    """The policy loss `name` as an entry of `losses.POLICY_LOSSES`, and its options, chosen as by `pair_loss`. Raises the same."""
    function, says = load(name), declared(load(name))
    takes = _takes(name, function, TOKEN, {*given, "log_ratio", *options})
    if says.couples is not None:
        raise ConfigError(f"{OPTION} {name}: own_loss(couples=...) is of preference losses; a policy loss is one of tokens")
    if says.level is not None and "log_ratio" not in takes:
        raise ConfigError(f"{OPTION} {name}: own_loss(level={says.level!r}) says whose ratio log_ratio is, which its signature lacks")
    _check_options(name, options, takes, given, ("log_ratio",))

    @wraps(function)
    def token_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, log_ratio: Tensor | None = None, **more: Any) -> Tensor:
        if "log_ratio" in takes:
            more["log_ratio"] = logps - old_logps.detach() if log_ratio is None else log_ratio
        found = _call(name, function, (logps, old_logps.detach(), advantages.detach()), more)
        _check_shape(name, found, logps, "token", "N")
        return found  # type: ignore[no-any-return]

    chosen = {option: value for option, value in {**given, **options}.items() if option in takes}
    _try_tokens(name, token_loss, chosen, "log_ratio" in takes)
    return PolicyLoss(token_loss, AGGREGATES[says.aggregate or "token_mean"], says.level or "token"), chosen


def takes_of(function: Callable[..., Any]) -> set[str]:
    """The options in a function's signature."""
    return {name for name, parameter in signature(function).parameters.items() if parameter.kind is not Parameter.VAR_KEYWORD}


def _takes(name: str, function: Callable[..., Any], positional: tuple[str, ...], known: set[str]) -> set[str]:
    """The options of a function of these positional arguments. Raises ConfigError when it cannot be called with them."""
    wanted = f"it is called as {name.rpartition(':')[2]}({', '.join(positional)}, **options)"
    try:
        shape: Signature = signature(function)
        bound = shape.bind_partial(*positional)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{OPTION} {name}: {wanted}, which does not fit its signature ({error})") from error
    rest = {option: parameter for option, parameter in shape.parameters.items() if option not in bound.arguments}
    named = {option for option, parameter in rest.items() if parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)}
    if lacking := [option for option in named if rest[option].default is Parameter.empty and option not in known]:
        raise ConfigError(
            f"{OPTION} {name}: {wanted}, where options are {', '.join(sorted(known))}; {lacking[0]!r} of its signature {shape} is none of "
            f"them: give it a default, or set --loss_options '{{{lacking[0]}: 1.0}}'"
        )
    return named


def _check_options(name: str, options: Mapping[str, Any], takes: set[str], given: Mapping[str, Any], ours: tuple[str, ...]) -> None:
    if unknown := sorted(set(options) - takes):
        raise ConfigError(f"loss_options: {name} takes no {unknown[0]!r}; it takes {', '.join(sorted(takes)) or 'no options'}")
    if taken := sorted(set(options) & {*given, *ours}):
        raise ConfigError(f"loss_options: {taken[0]!r} is given to {name} by the run itself; leave it out")


def _call(name: str, function: Callable[..., Any], arguments: tuple[Tensor, ...], options: Mapping[str, Any]) -> Any:
    try:
        return function(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise LossError(f"{OPTION} {name} raised {type(error).__name__}: {error}") from error


def _check_shape(name: str, found: Any, like: Tensor, one: str, letter: str) -> None:
    if not isinstance(found, Tensor) or found.shape != like.shape:
        got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise LossError(f"{OPTION} {name} must return a loss for each {one}, a tensor ({letter},) = {tuple(like.shape)}, got {got}")


def _numbers(seed: int, *columns: float) -> list[Tensor]:
    """Five of each, float64, negative and of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [-size * torch.rand(5, generator=generator, dtype=torch.float64) - 0.01 for size in columns]


def _try_pairs(loss: OwnPairLoss) -> None:
    four = _numbers(0, 3.0, 3.0, 3.0, 3.0)
    four[0], four[1] = four[0].requires_grad_(), four[1].requires_grad_()
    known = dict(zip(LENGTHS, torch.tensor([[3, 5, 1, 8, 2], [4, 1, 6, 2, 9]]))) if loss.takes_lengths else {}

    def of(rows: slice) -> Tensor:
        return loss(*(x[rows] for x in four), **{name: x[rows] for name, x in known.items()}).loss

    _check_tried(loss.name, of)
    if loss.couples == "pair":
        _check_local(
            loss.name, of, "pair", "other pairs", "declare it with @fastalign.losses.own_loss(couples='step'), or take it from its own pair"
        )


def _try_tokens(name: str, token_loss: Callable[..., Tensor], options: Mapping[str, Any], takes_ratio: bool) -> None:
    logps, old = _numbers(1, 2.0, 2.0)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5], dtype=torch.float64)
    logps.requires_grad_()

    def of(rows: slice) -> Tensor:
        ratio = {"log_ratio": (logps - old)[rows]} if takes_ratio else {}
        return token_loss(logps[rows], old[rows], advantages[rows], **ratio, **options)

    _check_tried(name, of)
    _check_local(name, of, "token", "other tokens", "take it from its own token; own_loss(level='sequence') gives it its sequence's ratio")


def _check_tried(name: str, of: Callable[[slice], Tensor]) -> None:
    found = of(slice(0, 5))
    if not found.requires_grad:
        raise ConfigError(f"{OPTION} {name}: its loss has no gradient; do not detach the log-probs, nor go by way of numbers or NumPy")
    if not bool(found.isfinite().all()):
        raise ConfigError(f"{OPTION} {name}: its loss is not finite for log-probs between -3 and 0 (it is {found.tolist()})")


def _check_local(name: str, of: Callable[[slice], Tensor], one: str, others: str, remedy: str) -> None:
    whole, parts = of(slice(0, 5)), torch.cat([of(slice(i, i + 1)) for i in range(5)])
    if not torch.allclose(whole, parts, rtol=1e-5, atol=1e-6):
        raise ConfigError(
            f"{OPTION} {name}: the loss of a {one} depends on {others} (alone {float(parts[0].detach()):.6g}, among five "
            f"{float(whole[0].detach()):.6g}); {remedy}"
        )
