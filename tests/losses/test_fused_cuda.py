"""The fused losses on a GPU: against float64, bitwise reruns, CUDA graphs, launches, syncs. Run by `make gpu`."""

import pytest
import torch
from fused_cases import (
    LEVELS,
    OPTIONS,
    PAIRED,
    SEQUENCE_CASES,
    SEQUENCE_IDS,
    Policy,
    Sequences,
    check_extremes,
    check_nan_is_not_hidden,
    check_policy,
    check_sequences,
)
from fused_cases import poisoned as poisoned

from fastalign.losses import fused_triton
from fastalign.losses.policy import POLICY_LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the fused losses on a GPU are unproven here"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_policy_with_every_term(name, level):
    case = Policy("cuda")
    assert fused_triton.available(case.tensors["logps"])
    check_policy(case, name, OPTIONS["all"], level=level)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("terms", [t for t in OPTIONS if t != "all"])
def test_policy_term_by_term(terms, level):
    check_policy(Policy("cuda", seed=1), "dapo", OPTIONS[terms], level=level)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
def test_policy_at_the_edges(name, level):
    check_extremes(name, level, "cuda")


@pytest.mark.parametrize(("name", "options"), SEQUENCE_CASES, ids=SEQUENCE_IDS)
def test_sequence_losses(name, options):
    check_sequences(Sequences("cuda"), name, **options)


@pytest.mark.parametrize("name", [*POLICY_LOSSES, *PAIRED, "kto"])
def test_the_same_bits_on_a_rerun(name):
    case = Policy("cuda") if name in POLICY_LOSSES else Sequences("cuda")

    def run():
        if name in POLICY_LOSSES:
            out, *d = case.run(fused_triton.policy_loss, name)
            return [*out, *d]
        loss, d, statistics = case.fused(name)
        return [loss, d, *statistics]

    first = run()
    assert all(torch.equal(x, y) for _ in range(5) for x, y in zip(first, run()))


def test_nan_is_not_hidden():
    check_nan_is_not_hidden("cuda")


@pytest.mark.parametrize("kind", ["policy", "preference"])
def test_graph_capture_without_a_sync(kind):
    """A captured step follows its inputs, denominators on the device included."""
    torch.manual_seed(0)
    logps, old, a = (torch.randn(4096, device="cuda") for _ in range(3))
    cu_seqlens = torch.tensor([0, 1000, 1000, 2500, 4096], dtype=torch.int32, device="cuda")
    ref, denominator = torch.randn(4, device="cuda"), torch.tensor(7.0, device="cuda")
    logps.requires_grad_()

    def step():
        if kind == "policy":
            out = fused_triton.policy_loss("gspo", logps, old, a, cu_seqlens, denominator=denominator, ref_logps=old, kl_coef=0.1)
        else:
            out = fused_triton.preference_loss("sigmoid", logps, cu_seqlens, ref, denominator=denominator)
        return out.loss, *torch.autograd.grad(out.loss, logps)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logps.copy_(torch.randn(4096, device="cuda"))
        denominator.fill_(3.0)
    graph.replay()
    for x, y in zip(captured, step()):
        assert torch.equal(x, y) and x.any()


@pytest.mark.parametrize("kind", ["policy", "preference"])
def test_one_launch_and_a_sum(kind):
    case = Policy("cuda") if kind == "policy" else Sequences("cuda")
    logps, old = torch.randn(2, sum(case.cu_seqlens.diff().tolist()), device="cuda")

    def forward():
        if kind == "policy":
            fused_triton.policy_loss("grpo", logps, old, old, case.cu_seqlens, denominator=8.0, ref_logps=old, kl_coef=0.1)
        else:
            fused_triton.preference_loss("sigmoid", logps, case.cu_seqlens, case.ref_logps)

    forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if "policy_kernel" in name or "pair_kernel" in name]
    filled = [name for name in kernels if "fill" in name.lower()]  # by the fixture
    assert len(ours) == 1 and len(kernels) - len(filled) == 2, kernels
