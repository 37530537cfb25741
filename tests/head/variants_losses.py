"""How the kernels of `fastalign.losses.policy_triton` and `fastalign.losses.preference_triton` are launched.

Sequences begin anywhere, so nothing is loaded 128 bits at a time, and stored so only where an address may be odd (ROCm).
"""

from machine_code import Variant

from fastalign.losses import policy, policy_triton, preference, preference_triton, reference_free

MASKS = {"mask_ptr": "*i1", "keep_ptr": "*i1", "entropy_mask_ptr": "*i1"}
POLICY_ONLY = (*MASKS, "weights_ptr", "ref_ptr", "entropy_ptr", "d_entropy_ptr", "denominator_ptr", "entropy_coef_ptr")
NUMBERS = ("divisor", "kl_coef", "entropy_coef", "low", "high", "p0", "p1", "p2", "p3", "scale", "beta", "alpha", "kl")
SCALARS = dict.fromkeys((*NUMBERS, "desirable_weight", "undesirable_weight"), "fp32")


def policy_variant(token_loss, absent=POLICY_ONLY, level=0, per_sequence=True, mean=False) -> Variant:
    return Variant(
        policy_triton.policy_kernel,
        policy_triton.LAUNCH,
        absent,
        {**SCALARS, **MASKS, "cu_ptr": "*i32", "denominator_ptr": "*i64"},
        constants=lambda rocm: {
            "TOKEN_LOSS": policy_triton.TERMS[token_loss][0],
            "WHOLE_WEIGHT": token_loss is policy.vespo,
            "LEVEL": level,
            "PER_SEQUENCE": per_sequence,
            "SEQUENCE_MEAN": mean,
            "KL": 3,
            "CORRECTED": True,
            "BLOCK": policy_triton.BLOCK,
        },
        wide_loads=False,
        wide_stores=False,
    )


def pair_variant(pair_loss, absent=("weight_ptr", "denominator_ptr"), score=preference_triton.reverse_kl) -> Variant:
    pair = preference_triton.PAIR_LOSSES[pair_loss]
    return Variant(
        preference_triton.pair_kernel,
        preference_triton.LAUNCH,
        (*absent, "ref_ptr") if pair_loss in reference_free.REFERENCE_FREE_LOSSES.values() else absent,
        {**SCALARS, "cu_ptr": "*i32", "denominator_ptr": "*i64"},
        constants=lambda rocm: {
            "PAIR_LOSS": pair.loss,
            "SCORE": score,
            "PER_TOKEN": pair.per_token,
            "BLOCK": preference_triton.BLOCK,
        },
        wide_loads=False,
        wide_stores=None,
    )


TOKEN_LOSSES = {spec.token_loss.__name__: spec.token_loss for spec in policy.POLICY_LOSSES.values()}
PAIRS = {f"pairs {loss.__name__}": pair_variant(loss) for loss in preference_triton.PAIR_LOSSES}
SCORES = {f"pairs dpo by {s.__name__}": pair_variant(preference.dpo, (), kernel) for s, kernel in preference_triton.SCORES.items()}
VARIANTS = {
    **{f"policy {name}": policy_variant(loss) for name, loss in TOKEN_LOSSES.items()},
    **{f"policy {name}, all terms": policy_variant(TOKEN_LOSSES[name], (), 0, False, True) for name in ("ppo_clip", "cispo", "vespo")},
    "policy ppo_clip of sequences": policy_variant(policy.ppo_clip, level=1, mean=True),
    "policy ppo_clip of sequences, all terms": policy_variant(policy.ppo_clip, (), 1, False, True),
    **{name: PAIRS[name] for name in ("pairs dpo", "pairs orpo", "pairs discopop")},
    "pairs dpo by alpha_divergence": SCORES["pairs dpo by alpha_divergence"],
    "unpaired": Variant(
        preference_triton.unpaired_kernel,
        preference_triton.LAUNCH,
        (),
        {**SCALARS, "cu_ptr": "*i32", "desirable_ptr": "*i1", "denominator_ptr": "*i64"},
        constants=lambda rocm: {"BLOCK": preference_triton.BLOCK},
        wide_loads=False,
        wide_stores=None,
    ),
}
OTHERS = {name: variant for name, variant in (PAIRS | SCORES).items() if name not in VARIANTS}  # compiled for one target only
