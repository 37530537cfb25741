"""Losses of reward models: functions of the scores that a model gives to completions, with gradient, unreduced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.segments import segment_expand, segment_sum


def bradley_terry(
    chosen: Tensor,  # (P,) float32, scores
    rejected: Tensor,  # (P,)
    *,
    margin: Tensor | float = 0.0,  # (P,) by how much the chosen should win
    center_coef: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of the preferences, (P,). Bradley and Terry 1952; Ouyang 2022, arXiv:2203.02155 eq. 1.

    loss_i = -log sigmoid(c_i - r_i - margin_i) + center_coef (c_i + r_i)^2

    The margin is that of Touvron 2023 (Llama 2), arXiv:2307.09288 eq. 2; centering keeps scores around 0, which pairs leave
    open (Eisenstein 2023, arXiv:2312.09244 section 4). Raises ValueError when shapes differ.

    >>> bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]), margin=torch.tensor([1.0]), center_coef=0.5)
    tensor([1.1931])
    """
    if chosen.shape != rejected.shape or (isinstance(margin, Tensor) and margin.shape not in ((), chosen.shape)):
        got = f"{tuple(chosen.shape)}, {tuple(rejected.shape)} and margin {tuple(getattr(margin, 'shape', ()))}"
        raise ValueError(f"bradley_terry takes chosen, rejected and margin of one shape (P,), got {got}")
    loss = -logsigmoid(chosen - rejected - margin)
    return loss + center_coef * (chosen + rejected) ** 2 if center_coef else loss


def plackett_luce(
    scores: Tensor,  # (S,) float32
    labels: Tensor,  # (S,) the ranking: the higher the better, only the order counts
    cu_groups: Tensor,  # (G+1,) int32, completions of the same prompt
) -> Tensor:
    """Negative log-likelihood of each group's ranking, (G,). Plackett 1975; Luce 1959; Xia 2008 (ListMLE).

    loss_g = sum_{i in g} (log sum_{j in below(i)} e^{s_j} - s_i),  below(i) = i and all of its group with a lower label

    Completions with the same label are not compared with each other. A group of two is Bradley-Terry; one that has a single
    label has loss 0. Memory is S^2. Raises ValueError when shapes do not fit.

    >>> groups = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> plackett_luce(torch.zeros(5), torch.tensor([2.0, 3.0, 1.0, 4.0, 4.0]), groups)  # log 3! and a tie
    tensor([1.7918, 0.0000])
    """
    if scores.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(f"plackett_luce takes scores and labels of one shape (S,), got {tuple(scores.shape)} and {tuple(labels.shape)}")
    ids = torch.arange(cu_groups.numel() - 1, device=scores.device, dtype=torch.float32)
    group = segment_expand(ids, cu_groups, scores.shape[0])
    below = (group[:, None] == group) & (labels[:, None] > labels)
    below = below | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    rest = scores.expand(len(scores), -1).masked_fill(~below, float("-inf")).logsumexp(dim=1)
    return segment_sum(rest - scores, cu_groups)
