"""fastalign: alignment training whose losses see per-token log-probabilities, never logits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "linear_logps": "fastalign.head.api",
    "linear_loss": "fastalign.head.api",
    "linear_cross_entropy": "fastalign.head.api",
    "parallel_linear_logps": "fastalign.head.parallel",
    "parallel_linear_loss": "fastalign.head.parallel_loss",
    "linear_divergence": "fastalign.head.divergence",
    "linear_divergence_outputs": "fastalign.head.divergence",
    "linear_divergence_loss": "fastalign.head.divergence",
    "DivergenceOutput": "fastalign.head.divergence",
    "HeadOutput": "fastalign.types",
    "PreferenceLoss": "fastalign.types",
    "segment_sum": "fastalign.segments",
    "segment_mean": "fastalign.segments",
    "losses": "fastalign.losses",
    "load_model": "fastalign.models.load",
    "head_spec": "fastalign.models.heads",
    "HeadSpec": "fastalign.models.heads",
    "train": "fastalign.train",
    "SFTConfig": "fastalign.objectives.sft",
    "RewardConfig": "fastalign.objectives.reward",
    "DPOConfig": "fastalign.objectives.dpo",
    "DistillConfig": "fastalign.objectives.distill",
    "KTOConfig": "fastalign.objectives.kto",
    "ORPOConfig": "fastalign.objectives.orpo",
    "CPOConfig": "fastalign.objectives.cpo",
    "SimPOConfig": "fastalign.objectives.cpo",
    "GRPOConfig": "fastalign.objectives.grpo",
    "RLOOConfig": "fastalign.objectives.rloo",
    "ReinforcePPConfig": "fastalign.objectives.reinforce_pp",
    "PPOConfig": "fastalign.objectives.ppo",
    "OnlineDPOConfig": "fastalign.objectives.online_dpo",
    "GKDConfig": "fastalign.objectives.gkd",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from fastalign import losses as losses
    from fastalign.head.api import linear_cross_entropy as linear_cross_entropy
    from fastalign.head.api import linear_logps as linear_logps
    from fastalign.head.api import linear_loss as linear_loss
    from fastalign.head.divergence import DivergenceOutput as DivergenceOutput
    from fastalign.head.divergence import linear_divergence as linear_divergence
    from fastalign.head.divergence import linear_divergence_loss as linear_divergence_loss
    from fastalign.head.divergence import linear_divergence_outputs as linear_divergence_outputs
    from fastalign.head.parallel import parallel_linear_logps as parallel_linear_logps
    from fastalign.head.parallel_loss import parallel_linear_loss as parallel_linear_loss
    from fastalign.models.heads import HeadSpec as HeadSpec
    from fastalign.models.heads import head_spec as head_spec
    from fastalign.models.load import load_model as load_model
    from fastalign.objectives.cpo import CPOConfig as CPOConfig
    from fastalign.objectives.cpo import SimPOConfig as SimPOConfig
    from fastalign.objectives.distill import DistillConfig as DistillConfig
    from fastalign.objectives.dpo import DPOConfig as DPOConfig
    from fastalign.objectives.gkd import GKDConfig as GKDConfig
    from fastalign.objectives.grpo import GRPOConfig as GRPOConfig
    from fastalign.objectives.kto import KTOConfig as KTOConfig
    from fastalign.objectives.online_dpo import OnlineDPOConfig as OnlineDPOConfig
    from fastalign.objectives.orpo import ORPOConfig as ORPOConfig
    from fastalign.objectives.ppo import PPOConfig as PPOConfig
    from fastalign.objectives.reinforce_pp import ReinforcePPConfig as ReinforcePPConfig
    from fastalign.objectives.reward import RewardConfig as RewardConfig
    from fastalign.objectives.rloo import RLOOConfig as RLOOConfig
    from fastalign.objectives.sft import SFTConfig as SFTConfig
    from fastalign.segments import segment_mean as segment_mean
    from fastalign.segments import segment_sum as segment_sum
    from fastalign.train.loop import train as train
    from fastalign.types import HeadOutput as HeadOutput
    from fastalign.types import PreferenceLoss as PreferenceLoss


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastalign' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"fastalign.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
