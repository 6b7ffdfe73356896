"""The mechanisms, one file each; and recipes, which put them together."""

from biofx.analysis.sites import WeightSite
from biofx.base.options import check_choice, check_flag, check_integer, check_number
from biofx.model.slots import Slot
from biofx.passes.continual_backprop import ContinualBackprop
from biofx.passes.crystallize import Crystallize
from biofx.passes.dales_principle import DalesPrinciple
from biofx.passes.exponentiated_gradient import ExponentiatedGradient
from biofx.passes.fuzzy_learning_rates import FuzzyLearningRates
from biofx.passes.group_units import GroupUnits
from biofx.passes.inhibitory_interneurons import InhibitoryInterneurons
from biofx.passes.l1_regularization import L1Regularization
from biofx.passes.mirror_units import MirrorUnits
from biofx.passes.recipes import CORTEX, HOFMANN2025
from biofx.passes.rejuvenate import Rejuvenate
from biofx.passes.split_synapses import SplitSynapses
from biofx.passes.synaptic_scaling import SynapticScaling
from biofx.passes.volume_dependent_learning_rates import VolumeDependentLearningRates
from biofx.rewrite.editor import Editor
from biofx.rewrite.registry import Moment, Pass, option, recipes, register, register_recipe, registered_passes
from biofx.training.plastic_weight import PlasticWeight
from biofx.weights.facts import Need

register_recipe("hofmann2025", HOFMANN2025)
register_recipe("cortex", CORTEX)

__all__ = [
    "ContinualBackprop",
    "Crystallize",
    "DalesPrinciple",
    "Editor",
    "ExponentiatedGradient",
    "FuzzyLearningRates",
    "GroupUnits",
    "InhibitoryInterneurons",
    "L1Regularization",
    "MirrorUnits",
    "Moment",
    "Need",
    "Pass",
    "PlasticWeight",
    "Rejuvenate",
    "Slot",
    "SplitSynapses",
    "SynapticScaling",
    "VolumeDependentLearningRates",
    "WeightSite",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_number",
    "option",
    "recipes",
    "register",
    "register_recipe",
    "registered_passes",
]
