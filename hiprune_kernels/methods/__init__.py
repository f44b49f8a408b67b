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
from .hiprune import HiPrune

__all__ = [
    "METHODS",
    "DivPrune",
    "FasterVLM",
    "HiPrune",
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
    "fastervlm": FasterVLM,
    "divprune": DivPrune,
    "random": Random,
    "uniform-grid": UniformGrid,
}
