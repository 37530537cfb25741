"""Losses as pure functions of log-probabilities."""

from fastalign.losses.preference import PREFERENCE_LOSSES as PREFERENCE_LOSSES
from fastalign.losses.preference import dpo as dpo
from fastalign.losses.preference import hinge as hinge
from fastalign.losses.preference import ipo as ipo
