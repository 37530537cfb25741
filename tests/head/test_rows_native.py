"""The native row kernels on every instruction set of this machine: the contract, the edges, when they are chosen."""

import ctypes
import mmap
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from problems import ALL_OUTPUTS
from row_contract import EPS, Case, RowContract, assert_near

from fastalign import linear_logps
from fastalign.errors import DependencyError
from fastalign.head import native, plan, rows_native, rows_torch
from fastalign.head.plan import make_plan
from fastalign.head.rows import LogitMap

INF, NAN = float("inf"), float("nan")
needs_library = pytest.mark.skipif(
    native.find() is None, reason=f"there is no native library ({native.BUILD}): its row kernels are unproven here"
)


def works(name: str) -> bool:
    """The instruction set can be selected; the best one is in use afterwards."""
    try:
        native.select_isa(name)
    except ValueError:
        return False
    native.select_isa("best")
    return True


KNOWN = ("avx512", "avx2", "neon", "scalar")
HERE = [name for name in KNOWN if works(name)] if native.find() else []


@pytest.fixture(params=HERE)
def isa(request):
    native.select_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.select_isa("best")


@pytest.mark.parametrize("name", KNOWN)
def test_instruction_set_is_tested(name):
    if name not in HERE:
        pytest.skip(f"this machine or build has no {name}: its row kernels are unproven here")


@needs_library
@pytest.mark.usefixtures("isa")
class TestNative(RowContract):
    rows = rows_native

    def test_special_logits_leave_the_state_that_the_definition_leaves(self):
        big, rows = 3e38, []
        rows += [[-INF] * 40, [-INF] * 39 + [2.0], [INF] + [0.0] * 39, [NAN] + [0.0] * 39, [NAN, INF] * 20, [-INF, NAN] * 20]
        rows += [[big] * 40, [-big] * 40, [big, -big] * 20, [0.0] * 39 + [big], [1e-40] * 40, [-88.0, 0.0] * 20, [INF, -INF] * 20]
        x = torch.tensor(rows)
        for target in (0, 39):
            at = torch.full((len(rows),), target)
            for cuts in ([0, 40], [0, 1, 40], [0, 17, 39, 40]):
                states = []
                for impl in (rows_native, rows_torch):
                    state = impl.start(len(rows), frozenset(ALL_OUTPUTS), dtype=torch.float32, device=x.device)
                    for lo, hi in pairwise(cuts):
                        impl.update(state, x[:, lo:hi].contiguous(), at, lo, LogitMap())
                    states.append(state)
                for name in ("target_logit", "m", "s", "t", "q", "z_sum"):
                    got, want = (getattr(state, name) for state in states)
                    if name == "z_sum":  # the order of a sum decides whether 40 numbers of 3e38 and -3e38 overflow on the way
                        got, want = (torch.cat([a[:8], a[9:]]) for a in (got, want))
                    assert torch.allclose(got, want, rtol=1e-5, atol=1e-30, equal_nan=True), (name, cuts, got, want)
                a, b = (impl.finish(state) for impl, state in zip((rows_native, rows_torch), states))
                assert torch.equal(a["is_top1"], b["is_top1"])
                names = ("logps", "lse", "entropy", "mean_logits")
                c = dict.fromkeys(names, torch.ones(len(rows)))
                for keys in (names, ("logps",), ("mean_logits",)):
                    some = {name: c[name] for name in keys}
                    common = {"entropy": b["entropy"], "vocabulary": 40, "dtype": torch.float32}
                    d, want = (i.gradient_(x.clone(), at, 0, LogitMap(), b["lse"], some, **common) for i in (rows_native, rows_torch))
                    assert torch.allclose(d, want, rtol=1e-5, atol=1e-6, equal_nan=True), (keys, d, want)

    @pytest.mark.parametrize(("name", "low", "high", "bound"), [("exp", -87.33, 88.37, 1.1), ("tanh", -12.0, 12.0, 1.5)])
    def test_error_of_elementary_functions(self, name, low, high, bound):
        near_zero = torch.logspace(-30, 0, 100_001, dtype=torch.float64)
        x = torch.cat([torch.linspace(low, high, 2_000_001, dtype=torch.float64), near_zero, -near_zero]).float()
        x = x[(x >= low) & (x <= high)]
        gold = getattr(torch, name)(x.double())
        ulp = torch.exp2(torch.frexp(gold)[1].double() - 24)
        error = ((elementary(name, x).double() - gold).abs() / ulp).max()
        assert 0.4 < error <= bound

    def test_elementary_functions_at_the_ends(self):
        x = torch.tensor([-INF, -1e30, -87.34, 88.38, 1e30, INF, NAN, 0.0, -0.0])
        assert str(elementary("exp", x).tolist()) == "[0.0, 0.0, 0.0, inf, inf, inf, nan, 1.0, 1.0]"
        assert str(elementary("tanh", x).tolist()) == "[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, nan, 0.0, -0.0]"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_rounds_as_torch_does(self, dtype):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(256, 256)  # every number there is
        target = torch.zeros(256, dtype=torch.int64)
        x = torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))
        state = rows_native.start(256, frozenset(ALL_OUTPUTS), dtype=torch.float32, device=x.device)
        rows_native.update(state, x.clone(), target, 0, LogitMap())
        assert torch.equal(state.target_logit, x[:, 0].float()) and torch.equal(state.m, x.float().amax(1))
        values = torch.cat([torch.linspace(-7e4, 7e4, 4001), torch.logspace(-9, 0, 4001), torch.logspace(-40, -30, 4001)])
        values = torch.cat([values, torch.tensor([65519.0, 65520.0, 3.3e38, 3.4e38, INF, NAN, 2**-25, 1.5 * 2**-24, -0.0])])
        tile = torch.zeros(values.numel(), 3)
        lse = torch.zeros(values.numel())
        given = {"mean_logits": values * 3}
        common = {"entropy": None, "vocabulary": 3, "dtype": dtype}
        d = rows_native.gradient_(tile.clone(), torch.zeros(len(values), dtype=torch.int64), 0, LogitMap(), lse, given, **common)
        want = ((values * 3) / 3).to(dtype)
        assert torch.equal(d[:, 0].isnan(), want.isnan())
        assert torch.equal(d[:, 0].nan_to_num(), want.nan_to_num())

    def test_bits_do_not_depend_on_threads(self):
        case, threads, runs = Case(67, 5000, rich=True), torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                stats = case.score(rows_native)
                runs.append((*stats.values(), case.gradient(rows_native, stats)))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))

    def test_rows_beyond_2_31_elements(self):
        """Row 2 lies 2^31 + 32 elements behind row 0, in memory of which only the rows' own pages exist."""
        stride, columns = 2**30 + 16, 64
        size = 2 * stride + columns
        memory = mmap.mmap(-1, 4 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
        x = torch.frombuffer(memory, dtype=torch.float32, count=size).as_strided((3, columns), (stride, 1))
        x[2] = torch.randn(columns, generator=torch.Generator().manual_seed(0))
        near, target = x.clone(), torch.full((3,), 5)
        results = []
        for tile in (x, near):
            state = rows_native.start(3, frozenset(["logps"]), dtype=torch.float32, device=x.device)
            rows_native.update(state, tile, target, 0, LogitMap())
            out = rows_native.finish(state)
            c = {"logps": torch.ones(3)}
            d = rows_native.gradient_(tile, target, 0, LogitMap(), out["lse"], c, entropy=None, vocabulary=columns, dtype=x.dtype)
            results.append((out["logps"], d.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*results)) and abs(float(results[0][1][2, 5])) > 0.1


def elementary(name: str, x: torch.Tensor) -> torch.Tensor:
    function, y = getattr(native.library(), f"fastalign_rows_{name}"), torch.empty_like(x)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    assert function(x.data_ptr(), y.data_ptr(), x.numel()) == 0
    return y


@needs_library
def test_best_instruction_set_is_chosen():
    flags = set(re.search(r"^flags\s*:(.*)$", cpuinfo, re.M)[1].split()) if "flags" in (cpuinfo := read_cpuinfo()) else set()
    if not flags:
        pytest.skip("/proc/cpuinfo lists no flags: the choice is unproven here")
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    assert native.isa() == ("avx512" if avx512 else "avx2" if {"avx2", "fma", "f16c"} <= flags else "scalar")
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        native.select_isa("sse9")


def read_cpuinfo() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read()
    except OSError:
        return ""


@needs_library
def test_work_runs_on_the_threads_of_torch():
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch is built without OpenMP: that the pool is shared is unproven here")
    assert native.threading() == "openmp"


@needs_library
def test_kernels_refuse_what_they_would_get_wrong():
    state = rows_native.start(3, frozenset(["logps"]), dtype=torch.float32, device=torch.device("cpu"))
    for tile in (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(5, 3).T, torch.zeros(1, 5).expand(3, 5)):
        with pytest.raises(ValueError, match=rf"got {tile.dtype} on cpu, strides .*: use impl='torch'"):
            rows_native.update(state, tile, torch.zeros(3, dtype=torch.int64), 0, LogitMap())
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta")):
        with pytest.raises(ValueError, match=rf"compute in float32 on a CPU, got {dtype} on {device}"):
            rows_native.start(3, frozenset(["logps"]), dtype=dtype, device=torch.device(device))
    case = Case(3, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"of a torch\.bfloat16 tile as that or in half precision, not as torch\.float16"):
        case.gradient(rows_native, {"lse": torch.zeros(3), "entropy": torch.zeros(3)}, torch.float16)


def chosen(**request) -> str:
    return make_plan(64, 1000, 16, budget=1 << 24, **request).impl


def test_auto_takes_native_on_a_cpu(monkeypatch):
    monkeypatch.setattr(plan, "_has_triton", lambda: True)
    monkeypatch.setattr(plan, "_has_native", lambda: True)
    assert chosen() == chosen(dtype=torch.bfloat16) == chosen(dtype=torch.float16) == "native"
    assert chosen(dtype=torch.float64) == chosen(device="mps") == chosen(impl="torch") == "torch"
    assert chosen(device="cuda") == "triton"
    monkeypatch.setattr(plan, "_has_native", lambda: False)
    assert chosen() == "torch"


def test_native_is_refused_where_it_cannot_run(monkeypatch):
    operands = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(native, "find", lambda: None)
    native.library.cache_clear()
    try:
        with pytest.raises(DependencyError, match=r"not there: build it in a checkout .* FASTALIGN_NATIVE=1, or use impl='torch'"):
            linear_logps(*operands, impl="native")
    finally:
        native.library.cache_clear()


def test_a_library_that_is_none_is_named(monkeypatch, tmp_path):
    path = tmp_path / native.NAME
    path.write_text("not a library")
    monkeypatch.setattr(native, "find", lambda: path)
    native.library.cache_clear()
    try:
        with pytest.raises(DependencyError, match=rf"{re.escape(str(path))} cannot be loaded"):
            native.library()
    finally:
        native.library.cache_clear()


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "VERSION", 1000)
    native.library.cache_clear()
    try:
        with pytest.raises(DependencyError, match=r"has version \d+, this fastalign needs 1000"):
            native.library()
    finally:
        native.library.cache_clear()


@needs_library
def test_native_is_refused_elsewhere():
    with pytest.raises(ValueError, match=r"hidden is float64: use impl='torch'"):
        chosen(dtype=torch.float64, impl="native")
    with pytest.raises(ValueError, match=r"runs on a CPU, but hidden is on meta"):
        chosen(device="meta", impl="native")


def test_import_loads_no_library():
    code = "import fastalign; fastalign.linear_logps; from pathlib import Path; maps = Path('/proc/self/maps')\n"
    code += "assert not maps.exists() or 'fastalign_native' not in maps.read_text()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_assert_near_sees_small_errors():
    with pytest.raises(AssertionError, match="error"):
        assert_near(torch.ones(3), torch.ones(3) + 1e-3, 8 * EPS, "x")
