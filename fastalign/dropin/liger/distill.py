"""Distillation under Liger's name: generalised Jensen-Shannon divergence beside cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastalign.dropin.precision import as_multiplied
from fastalign.head.api import linear_cross_entropy
from fastalign.head.divergence import linear_divergence_loss
from fastalign.head.divergence_function import DivergenceOutput


class LigerFusedLinearJSDLoss(nn.Module):
    """Distillation, Liger's call: `module(student_input, student_weight, teacher_input, teacher_weight, true_labels, ...)`.

    student_input (N, D) and student_weight (V, D) with gradients, teacher_input (N, D2), teacher_weight (V2, D2), true_labels (N,).

        loss = weight_soft_loss JSD_beta(student / temperature, teacher / temperature) + weight_hard_loss cross-entropy

    both averaged over the labels that are not ignored; beta 0 is KL(teacher || student), 1 the reverse. Returns the loss, or with
    return_soft_hard_loss (loss, soft, hard), of which only the loss has a gradient. At temperature 1 both come from one pass. A teacher
    with V2 > V meets a student whose further logits are 0, as in Liger. Raises ValueError for V2 < V and shapes that do not fit.

    >>> hidden, weight = torch.zeros(1, 4), torch.zeros(8, 4)
    >>> round(float(LigerFusedLinearJSDLoss()(hidden, weight, hidden, weight, torch.tensor([3]))), 4)  # log(8) / 2
    1.0397
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        budget: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.temperature, self.return_soft_hard_loss = temperature, return_soft_hard_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.options: dict[str, Any] = {"ignore_index": ignore_index, "budget": budget, "impl": impl}

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        missing = teacher_weight.shape[0] - student_weight.shape[0]
        if missing < 0:
            raise ValueError(f"the teacher's vocabulary {teacher_weight.shape[0]} is smaller than the student's {student_weight.shape[0]}")
        student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias = as_multiplied(  # type: ignore[assignment]
            student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias
        )
        count = (true_labels != self.options["ignore_index"]).sum().clamp(min=1)
        hard_wanted = self.weight_hard_loss != 0 or self.return_soft_hard_loss
        together = hard_wanted and not missing and self.temperature == 1.0
        soft = torch.zeros((), dtype=torch.promote_types(student_input.dtype, torch.float32), device=student_input.device)
        hard = soft.clone()

        def loss_fn(out: DivergenceOutput, rows: slice) -> Tensor:
            divergence = out.divergence.sum() / count
            soft.add_(divergence.detach())
            loss = self.weight_soft_loss * divergence
            if together and out.logps is not None:
                imitation = -out.logps.sum() / count
                hard.add_(imitation.detach())
                loss = loss + self.weight_hard_loss * imitation
            return loss

        loss = linear_divergence_loss(
            student_input,
            pad(student_weight, (0, 0, 0, missing)) if missing else student_weight,
            teacher_input,
            teacher_weight,
            loss_fn,
            true_labels,
            kind="jsd",
            beta=self.beta,
            temperature=self.temperature,
            bias=student_bias if student_bias is None or not missing else pad(student_bias, (0, missing)),
            ref_bias=teacher_bias,
            **self.options,
        )
        if hard_wanted and not together:
            imitation = linear_cross_entropy(student_input, student_weight, true_labels, bias=student_bias, **self.options)
            hard, loss = imitation.detach(), loss + self.weight_hard_loss * imitation
        return (loss, soft, hard) if self.return_soft_hard_loss else loss
