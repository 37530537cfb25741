"""DPO, ORPO, CPO and SimPO under Liger's names: a batch of P chosen sequences followed by the P rejected ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.dropin.liger.scoring import check_padded, logits_sums, need_reference, padded_logps, padded_loss, per_sequence
from fastalign.losses.preference import PREFERENCE_LOSSES
from fastalign.losses.reference_free import cpo, log_odds_ratio, orpo, simpo
from fastalign.types import HeadOutput, PreferenceLoss

SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")  # losses of DPO that know label_smoothing
PER_TOKEN = ("ipo", "sigmoid_norm")  # those that divide log-ratios by lengths
COUPLED = ("aot", "aot_unpaired")  # those that rank all pairs of a batch
DISCOPOP_TAU = 0.05

# (chosen_logps, rejected_logps, pairs of this slab, lengths (p, 2)) -> the loss of each pair
PairLoss = Callable[[Tensor, Tensor, slice, Tensor], PreferenceLoss]


class _Paired(nn.Module):
    """What the four share; `forward` of each gives its loss of pairs to `_score`."""

    def __init__(
        self,
        ignore_index: int,
        beta: float,
        alpha: float,
        compute_nll_loss: bool,
        compiled: bool,
        average_log_prob: bool,
        chunk_size: int,
        budget: int | None,
        impl: str,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.average_log_prob = compute_nll_loss, average_log_prob
        self.compiled, self.chunk_size = compiled, chunk_size
        self.options: dict[str, Any] = {"ignore_index": ignore_index, "budget": budget, "impl": impl}

    def _score(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        pair_loss: PairLoss,
        nll_target: Tensor | None = None,
        coupled: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, and (chosen_logps, rejected_logps, mean chosen logits, mean rejected logits, nll, chosen and rejected rewards)."""
        check_padded(hidden, target)
        if target.shape[0] % 2 or not target.shape[0]:
            raise ValueError(f"a batch holds P chosen and then P rejected sequences, got {target.shape[0]} sequences")
        pairs, length = target.shape[0] // 2, target.shape[1]
        by_pair = target.unflatten(0, (2, pairs)).transpose(0, 1).flatten(0, 1)  # chosen, rejected, chosen, rejected ...
        counted = (by_pair != self.ignore_index).view(pairs, 2, length)
        lengths = counted.sum(2)
        own_nll = self.compute_nll_loss and nll_target is None
        tokens = lengths[:, 0].sum().clamp(min=1)
        kept = torch.zeros(4, pairs, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        nll = kept.new_zeros(())

        def loss_fn(out: HeadOutput, rows: slice) -> Tensor:
            here = slice(rows.start // (2 * length), rows.stop // (2 * length)) if length else slice(0, pairs)
            logps = out.logps.view(-1, length)
            chosen, rejected = per_sequence(logps, counted[here].flatten(0, 1), self.average_log_prob).view(-1, 2).unbind(1)
            result = pair_loss(chosen, rejected, here, lengths[here])
            kept[:, here] = torch.stack([chosen.detach(), rejected.detach(), result.chosen_rewards, result.rejected_rewards])
            loss = result.loss.sum() / pairs
            if own_nll:
                imitation = -logps[::2].sum() / tokens
                nll.add_(imitation.detach())
                loss = loss + self.alpha * imitation
            return loss

        states = hidden.unflatten(0, (2, pairs)).transpose(0, 1).flatten(0, 1)
        loss = padded_loss(states, weight, by_pair, bias, loss_fn, 2 * pairs if coupled else 2, **self.options)
        if self.compute_nll_loss and nll_target is not None:
            imitation = self._imitation(hidden[:pairs], weight, nll_target[:pairs], bias)
            nll, loss = imitation.detach(), loss + self.alpha * imitation
        logits = logits_sums(hidden, weight, bias).view(2, pairs).sum(1) / (pairs * length * weight.shape[0])
        return loss, (kept[0], kept[1], logits[0], logits[1], nll, kept[2], kept[3])

    def _imitation(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        """Mean negative log-likelihood of targets of its own: a pass of its own."""
        check_padded(hidden, target, ("_input", "nll_target"))
        tokens = (target != self.ignore_index).sum().clamp(min=1)
        return padded_loss(hidden, weight, target, bias, lambda out, rows: -out.logps.sum() / tokens, 1, **self.options)


class LigerFusedLinearDPOLoss(_Paired):
    """DPO and its family, Liger's call: `loss, metrics = module(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)`.

    _input (2P, T, D) and lin_weight (V, D) with gradients, target (2P, T) int64, the P chosen sequences before the P rejected ones.
    metrics = (chosen_logps, rejected_logps, mean chosen logits, mean rejected logits, nll, chosen_rewards, rejected_rewards), float32.

    loss_type takes every name of `fastalign.losses.PREFERENCE_LOSSES`: Liger's and "ipo", "sigmoid_norm", "aot", "aot_unpaired". ipo
    divides by lengths as TRL does. Without use_ref_model the reference's log-probs are 0. label_smoothing makes "sigmoid" cDPO, where
    Liger ignores it. Raises ValueError for options that the loss does not have, and shapes that do not fit.

    >>> hidden, weight, target = torch.zeros(2, 3, 4), torch.zeros(8, 4), torch.tensor([[1, 2, -100], [3, 4, 5]])
    >>> loss, metrics = LigerFusedLinearDPOLoss()(weight, hidden, target, ref_input=hidden, ref_weight=weight)
    >>> round(float(loss), 4)  # policy == reference: log 2
    0.6931
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = DISCOPOP_TAU,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size, budget, impl)
        self.use_ref_model, self.loss_type = use_ref_model, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        if loss_type not in PREFERENCE_LOSSES:
            raise ValueError(f"no loss of DPO is called {loss_type!r}; there are {', '.join(PREFERENCE_LOSSES)}")
        if label_smoothing and loss_type not in SMOOTHED:
            raise ValueError(f"label_smoothing would change nothing: {loss_type!r} has none, unlike {', '.join(SMOOTHED)}")
        if not 0.0 <= label_smoothing < 0.5 or (loss_type == "exo_pair" and not label_smoothing):
            raise ValueError(f"label_smoothing must be in [0, 0.5), and above 0 for 'exo_pair' (1e-3 is usual), got {label_smoothing}")
        if discopop_tau != DISCOPOP_TAU and loss_type != "discopop":
            raise ValueError(f"discopop_tau would change nothing: it belongs to 'discopop', not to {loss_type!r}")
        if average_log_prob and loss_type in PER_TOKEN:
            raise ValueError(f"average_log_prob would divide by the lengths twice: {loss_type!r} divides log-ratios by them itself")

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        pairs = target.shape[0] // 2
        reference: Tensor | None = None
        if self.use_ref_model:
            states, weight = need_reference(ref_input, ref_weight, "; without a reference pass use_ref_model=False")
            check_padded(states, target, ("ref_input", "target"))
            ref_logps = padded_logps(states, weight, target, ref_bias, **self.options)
            reference = per_sequence(ref_logps, target != self.ignore_index, self.average_log_prob).view(2, pairs)
        options: dict[str, Any] = {"beta": self.beta}
        if self.loss_type in SMOOTHED:
            options["label_smoothing"] = self.label_smoothing
        if self.loss_type == "discopop":
            options["tau"] = self.discopop_tau

        def pair_loss(chosen: Tensor, rejected: Tensor, here: slice, lengths: Tensor) -> PreferenceLoss:
            ref = torch.zeros_like(torch.stack([chosen, rejected])) if reference is None else reference[:, here]
            own = {"chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1]} if self.loss_type in PER_TOKEN else {}
            return PREFERENCE_LOSSES[self.loss_type](chosen, rejected, ref[0], ref[1], **options, **own)

        return self._score(_input, lin_weight, target, bias, pair_loss, coupled=self.loss_type in COUPLED)


class LigerFusedLinearORPOLoss(_Paired):
    """ORPO, Liger's call: `loss, metrics = module(lin_weight, _input, target, bias, nll_target)`; shapes as `LigerFusedLinearDPOLoss`.

    nll_target (2P, T): targets of the likelihood term, such as prompt and answer; None: those of `target`. It costs a pass of its own
    over the chosen sequences. metrics end with the means of the log-sigmoid and of the log odds ratio.

    >>> hidden, weight, target = torch.zeros(2, 1, 4), torch.zeros(8, 4), torch.tensor([[1], [3]])
    >>> round(float(LigerFusedLinearORPOLoss(beta=1.0)(weight, hidden, target)[0]), 4)  # log 8 + log 2
    2.7726
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(ignore_index, beta, 1.0, compute_nll_loss, compiled, True, chunk_size, budget, impl)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None, nll_target: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("nll_target would change nothing: compute_nll_loss is False")
        loss, metrics = self._score(_input, lin_weight, target, bias, lambda c, r, *_: orpo(c, r, beta=self.beta), nll_target)
        odds = log_odds_ratio(metrics[0], metrics[1])
        return loss, (*metrics, nn.functional.logsigmoid(odds).mean(), odds.mean())


class LigerFusedLinearCPOLoss(_Paired):
    """CPO, Liger's call: `loss, metrics = module(lin_weight, _input, target, bias)`; shapes and metrics as `LigerFusedLinearDPOLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size, budget, impl)
        self.label_smoothing = label_smoothing

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        def pair_loss(chosen: Tensor, rejected: Tensor, *_: Any) -> PreferenceLoss:
            return cpo(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)

        return self._score(_input, lin_weight, target, bias, pair_loss)


class LigerFusedLinearSimPOLoss(_Paired):
    """SimPO, Liger's call: `loss, metrics = module(lin_weight, _input, target, bias)`; shapes and metrics as `LigerFusedLinearDPOLoss`.

    Liger's defaults: beta 0.1, gamma 0.5 (the margin itself, not its ratio to beta) and a likelihood term, which SimPO's paper has not.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, compiled, True, chunk_size, budget, impl)
        self.label_smoothing, self.gamma = label_smoothing, gamma

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        def pair_loss(chosen: Tensor, rejected: Tensor, *_: Any) -> PreferenceLoss:
            return simpo(chosen, rejected, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing)

        return self._score(_input, lin_weight, target, bias, pair_loss)
