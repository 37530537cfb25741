"""Which releases of TRL the patch serves, and what it replaces in each: the one table of `fastalign.dropin.trl`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from fastalign.errors import DependencyError


@dataclass(frozen=True)
class Release:
    """What a range of releases has, as names to look up."""

    paired: tuple[tuple[str, str], ...]  # (module, trainer) with a `concatenated_forward` that returns scores of pairs
    fused: tuple[str, str] | None = None  # (module, name) of the function that TRL's own fused head calls
    scoring: tuple[tuple[str, str, tuple[str, ...]], ...] = ()  # (module, trainer, methods) that score from logits of their model


_TRAINER, _EXPERIMENTAL = "trl.trainer.{0}_trainer", "trl.experimental.{0}.{0}_trainer"
_PAIRED_FIRST = ((_TRAINER.format("orpo"), "ORPOTrainer"), (_TRAINER.format("cpo"), "CPOTrainer"))
_PAIRED = ((_EXPERIMENTAL.format("orpo"), "ORPOTrainer"), (_EXPERIMENTAL.format("cpo"), "CPOTrainer"))
_POLICY = (
    (_TRAINER.format("sft"), "SFTTrainer", ("compute_loss",)),
    (_TRAINER.format("grpo"), "GRPOTrainer", ("_get_per_token_logps_and_entropies",)),
    (_TRAINER.format("rloo"), "RLOOTrainer", ("_get_per_token_logps_and_entropies",)),
)
_DPO = (_TRAINER.format("dpo"), "DPOTrainer", ("compute_loss", "compute_ref_log_probs"))
_DPO_FIRST = (_TRAINER.format("dpo"), "DPOTrainer", ("get_batch_loss_metrics", "compute_ref_log_probs"))
_KTO = (_TRAINER.format("kto"), "KTOTrainer", ("compute_loss", "compute_ref_log_probs"))
_KTO_EXPERIMENTAL = (_EXPERIMENTAL.format("kto"), "KTOTrainer", ("compute_loss", "compute_ref_log_probs"))
_KTO_BETWEEN = (_EXPERIMENTAL.format("kto"), "KTOTrainer", ("compute_loss", "compute_reference_log_probs"))
_KTO_BEFORE = (_EXPERIMENTAL.format("kto"), "KTOTrainer", ("get_batch_loss_metrics", "compute_reference_log_probs"))
_KTO_FIRST = (_TRAINER.format("kto"), "KTOTrainer", ("get_batch_loss_metrics", "compute_reference_log_probs"))

# Tested releases, the first two numbers of their versions.
RELEASES: dict[str, Release] = {
    **dict.fromkeys(("0.24", "0.25"), Release(_PAIRED_FIRST, scoring=(_DPO_FIRST, _KTO_FIRST, *_POLICY))),
    **dict.fromkeys(("0.26", "0.27", "0.28"), Release(_PAIRED, scoring=(_DPO_FIRST, _KTO_BEFORE, *_POLICY))),
    **dict.fromkeys(("0.29", "1.0", "1.1", "1.2", "1.3", "1.4"), Release(_PAIRED, scoring=(_DPO, _KTO_BEFORE, *_POLICY))),
    "1.5": Release(_PAIRED, scoring=(_DPO, _KTO_BETWEEN, *_POLICY)),
    **dict.fromkeys(("1.6", "1.7"), Release(_PAIRED, scoring=(_DPO, _KTO_EXPERIMENTAL, *_POLICY))),
    **dict.fromkeys(("1.8", "1.9", "1.10", "1.11", "1.12", "1.13", "1.14"), Release(_PAIRED, scoring=(_DPO, _KTO, *_POLICY))),
    **dict.fromkeys(("1.15", "1.16"), Release(_PAIRED, fused=("trl.trainer.utils", "_ChunkedLogProbFunction"))),
}


def installed_release() -> Release:
    """That of the installed TRL; DependencyError without TRL or for a release that is not in `RELEASES`."""
    first, *_, last = RELEASES
    tested = f"{first} to {last}: pip install 'trl=={last}.*'"
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise DependencyError(f"TRL is not installed; the patch is tested with {tested}") from None
    release = ".".join(version.split(".")[:2])
    if release not in RELEASES:
        raise DependencyError(f"TRL {version} is installed, and the patch is tested with {tested}")
    return RELEASES[release]
