"""The mechanisms, one file each."""

from biofx.editor import Editor
from biofx.passes.fuzzy_learning_rates import FuzzyLearningRates
from biofx.passes.split_synapses import SplitSynapses
from biofx.provenance import Slot
from biofx.registry import Pass, recipes, register, register_recipe, registered_passes
from biofx.weight_sites import WeightSite

__all__ = [
    "Editor",
    "FuzzyLearningRates",
    "Pass",
    "Slot",
    "SplitSynapses",
    "WeightSite",
    "recipes",
    "register",
    "register_recipe",
    "registered_passes",
]
