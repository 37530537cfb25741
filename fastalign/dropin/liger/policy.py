"""GRPO and its family under Liger's name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign.dropin.liger.scoring import check_padded, need_reference, padded_logps, padded_loss
from fastalign.losses.policy import policy_loss, resolve
from fastalign.types import IGNORE_INDEX, HeadOutput

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
UNCLIPPED = ("sapo", "vespo")


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO and its family, Liger's call: `loss, metrics = module(_input, lin_weight, selected_token_ids, attention_mask, advantages, ...)`.

    _input (B, T, D) and lin_weight (V, D) with gradients; selected_token_ids and attention_mask (B, T); advantages (B,); ref_ and
    old_per_token_logps (B, T); vllm_is_ratio (B, T) or (B, 1); num_items_in_batch counts the tokens of all processes and micro-batches.
    metrics = (mean KL, share of clipped tokens), the first only where beta is not 0.

    Without old log-probs they are the policy's own; without a reference (use_ref_model=False) the KL is 0. luspo weighs a sequence by
    its number of tokens: with a token's own ratio, or a KL, Liger and TRL also add what stands on padding and divide by T. Ours counts
    only tokens of the mask, which is the same number where all of it is set. Raises ValueError for unknown names, a ratio of sequences
    (importance_sampling_level) where the loss has none, options that the loss has not, and shapes that do not fit.

    >>> hidden, weight, mask = torch.zeros(1, 2, 4), torch.zeros(8, 4), torch.ones(1, 2)
    >>> module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    >>> float(module(hidden, weight, torch.tensor([[1, 2]]), mask, torch.tensor([2.0]))[0])  # ratio 1: minus the advantage
    -2.0
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if loss_type not in TYPES:
            raise ValueError(f"no loss of GRPO is called {loss_type!r}; there are {', '.join(TYPES)}")
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}")
        if importance_sampling_level == "sequence" and loss_type in ("cispo", *UNCLIPPED):
            raise ValueError(f"importance_sampling_level 'sequence' does not go with {loss_type!r}: use 'token'")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("dr_grpo divides by max_completion_length, the longest completion allowed: give it")
        if delta is not None and (not delta > 0 or loss_type in ("cispo", *UNCLIPPED)):
            raise ValueError(f"delta must be positive and bounds a clipped ratio, which {loss_type!r} must have: got {delta}")
        if not (sapo_temperature_pos > 0 and sapo_temperature_neg > 0):
            raise ValueError(f"the temperatures of sapo must be positive, got {sapo_temperature_pos} and {sapo_temperature_neg}")
        self.beta, self.use_ref_model, self.loss_type, self.level = beta, use_ref_model, loss_type, importance_sampling_level
        self.compiled, self.chunk_size, self.temperature = compiled, chunk_size, temperature
        self.use_bias_correction_kl = use_bias_correction_kl
        self.length = max_completion_length if loss_type == "dr_grpo" else None
        if loss_type == "cispo":
            self.loss_options: dict[str, Any] = {"clip_high": epsilon_high}
        elif loss_type == "sapo":
            self.loss_options = {"temperature_pos": sapo_temperature_pos, "temperature_neg": sapo_temperature_neg}
        elif loss_type == "vespo":
            self.loss_options = {
                "k_pos": vespo_k_pos,
                "lambda_pos": vespo_lambda_pos,
                "k_neg": vespo_k_neg,
                "lambda_neg": vespo_lambda_neg,
            }
        else:
            self.loss_options = {"clip_low": epsilon_low, "clip_high": epsilon_high, "delta": delta}
        resolve(loss_type, importance_sampling_level, self.length, "k3")
        self.options: dict[str, Any] = {"budget": budget, "impl": impl, "temperature": temperature}

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_padded(_input, selected_token_ids, ("_input", "selected_token_ids"))
        sequences, length = selected_token_ids.shape
        if attention_mask.shape != (sequences, length) or advantages.shape != (sequences,):
            got = f"{tuple(attention_mask.shape)} and {tuple(advantages.shape)}"
            raise ValueError(f"attention_mask must be ({sequences}, {length}) and advantages ({sequences},), got {got}")
        if ref_per_token_logps is not None and not self.use_ref_model:
            raise ValueError("ref_per_token_logps would change nothing: use_ref_model is False")
        mask = attention_mask.bool()
        target = selected_token_ids.masked_fill(~mask, IGNORE_INDEX)
        reference = ref_per_token_logps
        if self.beta and self.use_ref_model and reference is None:
            states, weight = need_reference(ref_input, ref_weight, ", or ref_per_token_logps")
            check_padded(states, target, ("ref_input", "selected_token_ids"))
            reference = padded_logps(states, weight, target, ref_bias, **self.options)
        weights = None if vllm_is_ratio is None else self._importance(vllm_is_ratio, mask)
        tokens = mask.sum().clamp(min=1)
        denominator = self._denominator(tokens, sequences, num_items_in_batch)
        kl, clipped = torch.zeros((2,), dtype=torch.float32, device=_input.device).unbind()

        def loss_fn(out: HeadOutput, rows: slice) -> Tensor:
            first, last = (rows.start // length, rows.stop // length) if length else (0, sequences)
            ends = torch.arange(last - first + 1, dtype=torch.int32, device=mask.device) * length
            old = out.logps.detach() if old_per_token_logps is None else old_per_token_logps[first:last].reshape(-1)
            result = policy_loss(
                self.loss_type,
                out.logps,
                old.to(out.logps.dtype),
                advantages[first:last, None].to(out.logps.dtype),
                ends,
                mask=mask[first:last].reshape(-1),
                denominator=denominator,
                level=self.level,
                importance_weights=None if weights is None else weights[first:last].reshape(-1).to(out.logps.dtype),
                ref_logps=None if reference is None or not self.beta else reference[first:last].reshape(-1).to(out.logps.dtype),
                kl_coef=self.beta,
                kl_correction=self.use_bias_correction_kl,
                length=self.length,
                **self.loss_options,
            )
            kl.add_(result.kl.sum() / tokens)
            clipped.add_((result.clipped_low.sum() + result.clipped_high.sum()) / tokens)
            return result.loss

        loss = padded_loss(_input, lin_weight, target, bias, loss_fn, 1, **self.options)
        return loss, ((kl, clipped) if self.beta else (clipped,))

    def _importance(self, ratio: Tensor, mask: Tensor) -> Tensor:
        """(B, T) weights; vespo multiplies over the tokens, so there a weight of a whole sequence stands on its first token alone."""
        if ratio.shape == mask.shape:
            return ratio
        if ratio.shape != (mask.shape[0], 1):
            raise ValueError(f"vllm_is_ratio must be {tuple(mask.shape)} or {(mask.shape[0], 1)}, got {tuple(ratio.shape)}")
        if self.loss_type != "vespo":
            return ratio.expand(mask.shape)
        first = mask & (mask.cumsum(1) == 1)
        return torch.where(first, ratio, torch.ones_like(ratio))

    def _denominator(self, tokens: Tensor, sequences: int, items: Tensor | float | None) -> Tensor | float:
        """Of this process: what the whole batch's sum is divided by."""
        if self.loss_type == "bnpo":
            return tokens
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            return float(sequences)
        parallel = dist.is_available() and dist.is_initialized()
        total = torch.as_tensor(tokens if items is None else items, dtype=torch.float32, device=tokens.device)
        if parallel and items is None:
            total = total.clone()
            dist.all_reduce(total)
        return (total / (dist.get_world_size() if parallel else 1)).clamp(min=1)
