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
    best_of_images,
    best_of_tiles,
    options_of,
    picks_of,
)
from .baselines import Random, UniformGrid
from .cdpruner import CDPruner
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .hiprune import HiPrune
from .hiprune_pp import HiPrunePlusPlus
from .hired import HiRED
from .ptp import PTP
from .text import ClipText
from .trim import TRIM
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "METHODS",
    "PTP",
    "TRIM",
    "CDPruner",
    "ClipText",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "HiPrune",
    "HiPrunePlusPlus",
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
    "VisPruner",
    "VisionZip",
    "best_of_images",
    "best_of_tiles",
    "options_of",
    "picks_of",
]

METHODS: dict[str, type[Method]] = {  # the command line's names
    "hiprune": HiPrune,
    "hiprune++": HiPrunePlusPlus,
    "ptp": PTP,
    "visionzip": VisionZip,
    "fastervlm": FasterVLM,
    "hired": HiRED,
    "vispruner": VisPruner,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "trim": TRIM,
    "fastv": FastV,
    "random": Random,
    "uniform-grid": UniformGrid,
}
