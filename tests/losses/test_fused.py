"""When the fused losses are available, what they cover and refuse, and their tests under Triton's interpreter."""

import re

import pytest
import torch
from support import pass_under_the_interpreter

from fastalign.errors import DependencyError
from fastalign.losses import fused_triton
from fastalign.losses.policy import POLICY_LOSSES
from fastalign.losses.preference import PREFERENCE_LOSSES
from fastalign.losses.reference_free import REFERENCE_FREE_LOSSES
from fastalign.losses.unpaired import UNPAIRED_LOSSES

WITHOUT = {"aot", "aot_unpaired"}
CU = torch.tensor([0, 2, 4], dtype=torch.int32)
GIVEN = (torch.zeros(4), CU, torch.zeros(2))


def test_every_loss_has_a_kernel_or_is_named():
    pytest.importorskip("triton", reason="Triton is not installed: what its kernels cover is unproven here")
    from fastalign.losses import policy_triton, preference_triton

    assert {spec.token_loss for spec in POLICY_LOSSES.values()} == set(policy_triton.TERMS)
    paired = PREFERENCE_LOSSES | REFERENCE_FREE_LOSSES
    assert {name for name, loss in paired.items() if loss not in preference_triton.PAIR_LOSSES} == WITHOUT
    assert {loss for name, loss in paired.items() if name not in WITHOUT} == set(preference_triton.PAIR_LOSSES)
    assert set(UNPAIRED_LOSSES) == {"kto", "apo_zero_unpaired"}


def test_available(monkeypatch):
    class OnGpu:
        is_cuda, dtype = True, torch.float32

    monkeypatch.setattr(fused_triton, "_has_triton", lambda: True)
    assert fused_triton.available(OnGpu()) and not fused_triton.available(torch.zeros(1))
    monkeypatch.setattr(OnGpu, "dtype", torch.float64)
    assert not fused_triton.available(OnGpu())
    monkeypatch.setattr(OnGpu, "dtype", torch.float32)
    monkeypatch.setattr(fused_triton, "_has_triton", lambda: False)
    assert not fused_triton.available(OnGpu())


def test_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fused_triton, "_has_triton", lambda: True)
    with pytest.raises(
        ValueError, match=r"in float32 on a CUDA or ROCm device, got torch.float32 on cpu: use the functions of losses.policy"
    ):
        fused_triton.policy_loss("grpo", torch.zeros(4), torch.zeros(4), torch.zeros(4), CU)
    with pytest.raises(ValueError, match=r"on a CUDA or ROCm device, got torch.float32 on cpu"):
        fused_triton.preference_loss("sigmoid", *GIVEN)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"got torch\.float64 on cpu"):
        fused_triton.preference_loss("sigmoid", torch.zeros(4).double(), CU, torch.zeros(2))
    with pytest.raises(ValueError, match="must be on the device of logps, cpu, got some on meta"):
        fused_triton.preference_loss("sigmoid", torch.zeros(4), CU, torch.zeros(2, device="meta"))
    monkeypatch.setattr(fused_triton, "_has_triton", lambda: False)
    with pytest.raises(DependencyError, match=re.escape("pip install 'fastalign[triton]'")):
        fused_triton.unpaired_loss("kto", *GIVEN, torch.ones(2) > 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fused_triton.preference_loss("dpo", *GIVEN), "no preference loss is called 'dpo'; there are sigmoid, hinge"),
        (lambda: fused_triton.preference_loss("sigmoid", torch.zeros(4), CU[:2], torch.zeros(1)), r"cu_seqlens must be \(2P\+1,\)"),
        (lambda: fused_triton.preference_loss("sigmoid", torch.zeros(4), CU), "sigmoid got none"),
        (lambda: fused_triton.preference_loss("simpo", *GIVEN), "simpo got them"),
        (lambda: fused_triton.preference_loss("sigmoid", torch.zeros(4), CU, torch.zeros(3)), r"ref_logps must be \(2,\), got \(3,\)"),
        (lambda: fused_triton.preference_loss("aot", *GIVEN), "aot has no kernel: use the functions of losses.preference"),
        (lambda: fused_triton.preference_loss("sigmoid", *GIVEN, beta=-1.0), "beta must be positive, got -1"),
        (lambda: fused_triton.preference_loss("exo_pair", *GIVEN, label_smoothing=0.0), r"must be in \(0, 0.5\) for exo"),
        (lambda: fused_triton.preference_loss("sigmoid", *GIVEN, score=torch.tanh), "no kernel scores a log-ratio by"),
        (lambda: fused_triton.unpaired_loss("bco", *GIVEN, torch.ones(2) > 0), "no unpaired loss is called 'bco'; there are kto"),
        (lambda: fused_triton.unpaired_loss("kto", *GIVEN, torch.ones(2)), "desirable must be bool, got torch.float32"),
        (lambda: fused_triton.unpaired_loss("apo_zero_unpaired", *GIVEN, torch.ones(2) > 0, kl=1.0), "kl belongs to kto"),
        (lambda: fused_triton.policy_loss("grpo", *[torch.zeros(4)] * 2, torch.zeros(3), CU), r"or \(2, 1\), one per sequence: got \(3,\)"),
        (lambda: fused_triton.policy_loss("ppo", *[torch.zeros(4)] * 3, CU), "no policy loss is called 'ppo'"),
    ],
)  # fmt: skip
def test_errors(call, said, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: the refusals of its kernels are unproven here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=said):
        call()


def test_options_of_another_loss_are_refused(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: the refusals of its kernels are unproven here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match="tau"):
        fused_triton.preference_loss("sigmoid", *GIVEN, tau=1.0)
    with pytest.raises(TypeError, match="clip_low"):
        fused_triton.policy_loss("sapo", *[torch.zeros(4)] * 3, CU, clip_low=0.1)


def test_kernels_under_the_interpreter():
    pass_under_the_interpreter("tests/losses/interpreted_fused.py", 140, "the fused losses")
