"""The Triton kernels of the divergences: their tests under Triton's interpreter, and what they refuse."""

import pytest
import torch
from support import pass_under_the_interpreter


def test_kernels_under_the_interpreter():
    pass_under_the_interpreter("tests/head/interpreted_divergence.py", 139, "the kernels of the divergences")


def test_kernels_refuse_what_they_would_get_wrong():
    pytest.importorskip("triton", reason="Triton is not installed: the refusals of its kernels are unproven here")
    from fastalign.head import divergence_triton
    from fastalign.head.rows import LogitMap

    nothing, cpu = frozenset(), torch.device("cpu")
    state = divergence_triton.start(3, "jsd", nothing, dtype=torch.float32, device=cpu)
    for tile in (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(5, 3).T, torch.zeros(3, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=rf"must be float32 .* got {tile.dtype}, strides .*: use impl='torch'"):
            divergence_triton.update(state, tile, tile, torch.zeros(3, dtype=torch.int64), 0, LogitMap(), LogitMap())
    with pytest.raises(ValueError, match=r"compute in float32, got torch\.float64"):
        divergence_triton.start(3, "jsd", nothing, dtype=torch.float64, device=cpu)
