"""Methods of pruning visual tokens, one object each; `base.py` says what a method is.

Nothing here loads transformers or PIL.
"""

from __future__ import annotations

from .base import (
    Method,
    Needs,
    Picks,
    Seen,
    Selection,
    Stage,
    TokenLayout,
    best_of_tiles,
    options_of,
    picks_of,
)
from .baselines import Random, UniformGrid
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .hiprune import HiPrune
from .hired import HiRED
from .ptp import PTP

__all__ = [
    "METHODS",
    "PTP",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "HiPrune",
    "HiRED",
    "Method",
    "Needs",
    "Picks",
    "Random",
    "Seen",
    "Selection",
    "Stage",
    "TokenLayout",
    "UniformGrid",
    "best_of_tiles",
    "options_of",
    "picks_of",
]

METHODS: dict[str, type[Method]] = {  # the command line's names
    "hiprune": HiPrune,
    "ptp": PTP,
    "fastervlm": FasterVLM,
    "hired": HiRED,
    "divprune": DivPrune,
    "fastv": FastV,
    "random": Random,
    "uniform-grid": UniformGrid,
}
