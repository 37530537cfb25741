"""How the kernels of `fastalign.head.rows_triton` are launched."""

from machine_code import Variant

from fastalign.head import rows_triton

PLAIN = ("bias_ptr", "inv_temperature_ptr")
LOGPS = (*PLAIN, "t_ptr", "q_ptr", "z_sum_ptr")
ONE = (*PLAIN, "entropy_ptr", "c_lse_ptr", "c_entropy_ptr", "c_mean_ptr")
SCALARS = {"target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}


def statistics(absent, capped=False, tile="fp32", aligned=True) -> Variant:
    return Variant(
        rows_triton.statistics_kernel,
        rows_triton.LAUNCH,
        absent,
        {"x_ptr": f"*{tile}", **SCALARS},
        ("stride_xn", "columns") if aligned else (),
        lambda rocm: {"CAPPED": capped, **rows_triton.lanes(4 if tile == "fp32" else 2, rocm)},
        wide_loads=aligned,
        wide_stores=False,
    )


def gradient(absent, capped=False, result="fp32", aligned=True) -> Variant:
    return Variant(
        rows_triton.gradient_kernel,
        rows_triton.LAUNCH,
        absent,
        {"d_ptr": f"*{result}", **SCALARS},
        ("stride_xn", "stride_dn", "columns") if aligned else (),
        lambda rocm: {"CAPPED": capped, "NARROW": result != "fp32", "BLOCK": rows_triton.BLOCK, "ROCM": rocm},
        wide_loads=aligned,
        wide_stores=aligned,
    )


VARIANTS = {
    "statistics": statistics(LOGPS),
    "statistics, bf16 tile": statistics(LOGPS, tile="bf16"),
    "statistics, fp16 tile": statistics(LOGPS, tile="fp16"),
    "statistics, odd width": statistics(LOGPS, aligned=False),
    "statistics, all outputs": statistics(PLAIN),
    "statistics, all outputs and options": statistics((), True),
    "gradient": gradient(ONE),
    "gradient, all terms and options": gradient((), True),
    "gradient to bf16": gradient(ONE, result="bf16"),
    "gradient to fp16": gradient(ONE, result="fp16"),
    "gradient to bf16, odd width": gradient(ONE, result="bf16", aligned=False),
    "gradient to bf16, all terms and options": gradient((), True, "bf16"),
}
