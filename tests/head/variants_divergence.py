"""How the kernels of `fastalign.head.divergence_triton` are launched."""

from machine_code import Variant

from fastalign.head import divergence_triton

OPTIONS = ("bias_ptr", "ref_bias_ptr", "inv_temperature_ptr")
ONE = (*OPTIONS, "entropy_ptr", "c_logps_ptr", "c_lse_ptr", "c_entropy_ptr")
NUMBERS = {"target_ptr": "*i64"} | dict.fromkeys(("inner", "outer", "ref_inner", "ref_outer", "beta"), "fp32")
WIDTHS = ("stride_xn", "stride_rn", "stride_dn", "columns")


def statistics(kind, absent=(*OPTIONS, "t_ptr"), capped=False, aligned=True) -> Variant:
    return Variant(
        divergence_triton.statistics_kernel,
        divergence_triton.LAUNCH,
        (*absent, "gap_ptr") if kind == "jsd" else absent,
        NUMBERS,
        WIDTHS if aligned else (),
        lambda rocm: {"KIND": kind, "CAPPED": capped, "REF_CAPPED": capped, **divergence_triton.lanes(rocm)},
        wide_loads=aligned,
        wide_stores=False,
    )


def mix(absent=OPTIONS, capped=False) -> Variant:
    return Variant(
        divergence_triton.mix_kernel,
        divergence_triton.LAUNCH,
        absent,
        NUMBERS,
        WIDTHS,
        lambda rocm: {"CAPPED": capped, "REF_CAPPED": capped, "BLOCK": divergence_triton.STEP},
        wide_stores=False,
    )


def gradient(kind, absent=ONE, result="bf16", capped=False, aligned=True) -> Variant:
    return Variant(
        divergence_triton.gradient_kernel,
        divergence_triton.LAUNCH,
        (*absent, "mean_ptr") if kind == "forward_kl" else absent,
        {**NUMBERS, "d_ptr": f"*{result}"},
        WIDTHS if aligned else (),
        lambda rocm: {
            "KIND": kind,
            "CAPPED": capped,
            "REF_CAPPED": capped,
            "NARROW": result != "fp32",
            "BLOCK": divergence_triton.BLOCK,
            "ROCM": rocm,
        },
        wide_loads=aligned,
        wide_stores=aligned,
    )


VARIANTS = {
    "statistics": statistics("forward_kl"),
    "statistics, reverse": statistics("reverse_kl"),
    "statistics, jsd": statistics("jsd"),
    "statistics, odd width": statistics("forward_kl", aligned=False),
    "statistics, all outputs and options": statistics("reverse_kl", (), True),
    "mixture": mix(),
    "mixture, all options": mix((), True),
    "gradient": gradient("forward_kl", result="fp32"),
    "gradient to bf16": gradient("forward_kl"),
    "gradient to bf16, reverse": gradient("reverse_kl"),
    "gradient to bf16, jsd": gradient("jsd"),
    "gradient to fp16, jsd": gradient("jsd", result="fp16"),
    "gradient to bf16, odd width": gradient("jsd", aligned=False),
    "gradient to bf16, all terms and options": gradient("jsd", (), "bf16", True),
}
