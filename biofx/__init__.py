"""biofx: a torch.fx compiler that gives the synapses of a PyTorch model biological properties."""

import sys
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

# An installed package contains its passes. In a checkout, which Python may find first, they lie next to the package.
if find_spec("biofx.passes") is None:
    _folder = Path(__file__).parents[1] / "passes"
    _spec = spec_from_file_location("biofx.passes", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_spec.name] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

from biofx import passes
from biofx.analysis.sites import WeightSite, l1, weight_sites
from biofx.analysis.units import Units, Verdict, units
from biofx.base import noise
from biofx.base.errors import (
    ArgumentError,
    BiofxError,
    CaptureError,
    ExportError,
    LifecycleError,
    NotJudgedError,
    PipelineError,
    SavingError,
    VerificationError,
)
from biofx.compiler import transform
from biofx.converter import BioConfig, BioConverter
from biofx.ensembles import stack_module_state
from biofx.looking import plot
from biofx.looking.difference import Difference, diff
from biofx.looking.drawing import draw
from biofx.looking.inspection import summary, table, to_networkx
from biofx.model import operators
from biofx.model.shard_placement import shard_placement
from biofx.output.export import export
from biofx.output.fold import fold
from biofx.rewrite.verification import verify
from biofx.saving import load, save
from biofx.training.attachment import Attachment, attach, detach
from biofx.training.history import History, record
from biofx.training.parallelism import parallelize

__version__ = version("biofx")

__all__ = [
    "ArgumentError",
    "Attachment",
    "BioConfig",
    "BioConverter",
    "BiofxError",
    "CaptureError",
    "Difference",
    "ExportError",
    "History",
    "LifecycleError",
    "NotJudgedError",
    "PipelineError",
    "SavingError",
    "Units",
    "Verdict",
    "VerificationError",
    "WeightSite",
    "attach",
    "detach",
    "diff",
    "draw",
    "export",
    "fold",
    "l1",
    "load",
    "noise",
    "operators",
    "parallelize",
    "passes",
    "plot",
    "record",
    "save",
    "shard_placement",
    "stack_module_state",
    "summary",
    "table",
    "to_networkx",
    "transform",
    "units",
    "verify",
    "weight_sites",
]
