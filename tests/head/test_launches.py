"""What the launchers hand to Triton, without a GPU: the types, constants and alignments for which a launch would compile a kernel.

A driver that only says which device it is stands in for CUDA, and nothing is compiled. So the kernels that the machine code tests compile
are those that run.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from row_contract import Case

triton = pytest.importorskip("triton", reason="Triton is not installed: what its launches ask for is unproven here")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastalign.head import divergence_triton, rows_triton  # noqa: E402
from fastalign.head.rows import LogitMap  # noqa: E402
from fastalign.losses import fused_triton, policy_triton, preference_triton  # noqa: E402

if not isinstance(rows_triton.statistics_kernel, JITFunction):
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile: launches are unproven here", allow_module_level=True)
import variants_divergence  # noqa: E402
import variants_losses  # noqa: E402
import variants_rows  # noqa: E402
from machine_code import Variant  # noqa: E402

KERNELS = [
    *(getattr(module, name) for module in (rows_triton, divergence_triton) for name in ("statistics_kernel", "gradient_kernel")),
    divergence_triton.mix_kernel,
    policy_triton.policy_kernel,
    preference_triton.pair_kernel,
    preference_triton.unpaired_kernel,
]


class Launch(NamedTuple):
    """Of every argument its type, or its value where that is compiled in, and whether it is known to be a multiple of 16."""

    kernel: Any
    arguments: dict[str, tuple[Any, bool]]
    options: dict[str, Any]


class OneDevice:
    """As much of a driver as a launch asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch from here on; none is compiled or run."""
    found: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel, aligned = fn.jit_function, compile["configs"][0]
        names, constants = kernel.arg_names, compile["constants"]
        arguments = {}
        for place, name in enumerate(names):
            kind = constants[(place,)] if (place,) in constants else compile["signature"][name]
            arguments[name] = kind, ["tt.divisibility", 16] in aligned.get((place,), [])
        options = {name: compile[name] for name in ("num_warps", "enable_fp_fusion")}
        found.append(Launch(kernel, arguments, options))
        return True  # that is all

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(jit, "serialize_specialization_data", lambda *_: "")  # for the hook alone; Triton 3.6 cannot, of functions
    monkeypatch.setattr(driver, "_active", OneDevice())
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return found


def expected(variant: Variant) -> dict[str, Any]:
    """What `machine_code.build` compiles a variant for."""
    given = dict.fromkeys(variant.absent) | variant.constants(False)
    types = {}
    for name in variant.kernel.arg_names:
        pointer = name.endswith("_ptr")
        kind = given[name] if name in given else variant.types.get(name, "*fp32" if pointer else "i32")
        types[name] = kind, name not in given and (pointer or name in variant.multiples)
    return types


def assert_compiled_ahead(launch: Launch, variant: Variant) -> None:
    """The machine code tests compile what is launched: they may know less of alignment, but not more."""
    assert launch.kernel is variant.kernel
    assert launch.options == variant.options
    want = expected(variant)
    assert {name: kind for name, (kind, _) in launch.arguments.items()} == {name: kind for name, (kind, _) in want.items()}
    for name, (_, aligned) in want.items():
        assert launch.arguments[name][1] or not aligned or name.endswith("_ptr"), name


@pytest.mark.parametrize("columns", [4096, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_kernels(launches, dtype, columns):
    tile = torch.zeros(8, columns + columns % 2, dtype=dtype)[:, :columns]
    target, options = torch.zeros(8, dtype=torch.int64), {"aligned": columns == 4096}
    state = rows_triton.start(8, frozenset({"logps"}), dtype=torch.float32, device=tile.device)
    rows_triton.update(state, tile, target, 16, LogitMap())
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert_compiled_ahead(launches[0], variants_rows.statistics(variants_rows.LOGPS, tile=name, **options))
    if dtype == torch.float32:
        given = {"entropy": None, "vocabulary": columns}
        for result, narrow in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            rows_triton.gradient_(tile, target, 0, LogitMap(), torch.zeros(8), {"logps": torch.ones(8)}, **given, dtype=narrow)
            assert_compiled_ahead(launches[-1], variants_rows.gradient(variants_rows.ONE, result=result, **options))
    assert len(launches) == (3 if dtype == torch.float32 else 1)


def test_row_kernels_with_every_option(launches):
    case = Case(8, 2048, rich=True)
    gold, _ = case.gold()
    case.score(rows_triton)
    case.gradient(rows_triton, {name: value.float() for name, value in gold.items()}, torch.bfloat16)
    assert_compiled_ahead(launches[0], variants_rows.statistics((), True, aligned=False))
    assert_compiled_ahead(launches[1], variants_rows.gradient((), True, "bf16", aligned=False))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences(launches, kind):
    x, ref = torch.zeros(2, 8, 4096)
    target, lse, plain = torch.zeros(8, dtype=torch.int64), torch.zeros(8), LogitMap()
    state = divergence_triton.start(8, kind, frozenset({"divergence", "logps"}), dtype=torch.float32, device=x.device)
    divergence_triton.update(state, x, ref, target, 0, plain, plain)
    assert_compiled_ahead(launches[0], variants_divergence.statistics(kind))
    if kind == "jsd":
        divergence_triton.mix(torch.zeros(2, 8), x, ref, plain, plain, lse, lse, 0.5)
        assert_compiled_ahead(launches[1], variants_divergence.mix())
    found = {"lse": lse, "ref_lse": lse, "divergence": lse, "student_kl": lse}
    given = {"kind": kind, "beta": 0.5, "dtype": torch.bfloat16}
    divergence_triton.gradient_(x, ref, target, 0, plain, plain, found, {"divergence": torch.ones(8)}, **given)
    assert_compiled_ahead(launches[-1], variants_divergence.gradient(kind))


def test_losses(launches, monkeypatch):
    monkeypatch.setattr(fused_triton, "_check_device", lambda *_: None)
    logps, cu_seqlens = torch.zeros(64), torch.tensor([0, 16, 48], dtype=torch.int32)
    mask, weights = torch.ones(64, dtype=torch.bool), torch.ones(64)
    fused_triton.policy_loss("grpo", logps, logps, torch.ones(2, 1), cu_seqlens, denominator=8.0)
    given = {"mask": mask, "keep": mask, "importance_weights": weights, "ref_logps": logps, "kl_coef": 0.1}
    given |= {"entropy": logps, "entropy_mask": mask, "entropy_coef": torch.tensor(0.1), "denominator": torch.tensor(7)}
    fused_triton.policy_loss("gspo", logps, logps, logps, cu_seqlens, **given)
    fused_triton.preference_loss("sigmoid", logps, cu_seqlens, torch.zeros(2))
    one, every, pair = launches
    assert_compiled_ahead(pair, variants_losses.VARIANTS["pairs dpo"])
    for launch in (one, every):
        assert launch.kernel is policy_triton.policy_kernel and launch.options == policy_triton.LAUNCH
    assert every.arguments["denominator_ptr"][0] == "*i64" and every.arguments["entropy_coef_ptr"][0] == "*fp32"
    assert every.arguments["mask_ptr"][0] in ("*i1", "*u1") and one.arguments["mask_ptr"][0] is None  # two names of one type
    assert not any(aligned for name, (_, aligned) in every.arguments.items() if name in ("logps_ptr", "old_ptr", "cu_ptr"))
