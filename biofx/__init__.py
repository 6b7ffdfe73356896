"""biofx: a torch.fx compiler that gives the synapses of a PyTorch model biological properties."""

from importlib.metadata import version

from biofx import passes
from biofx.analysis.sites import WeightSite, l1, weight_sites
from biofx.analysis.units import Units, units
from biofx.analysis.verdict import Verdict
from biofx.base.errors import (
    ArgumentError,
    BiofxError,
    CaptureError,
    ExportError,
    LifecycleError,
    NotJudgedError,
    PipelineError,
    VerificationError,
)
from biofx.compiler import transform
from biofx.converter import BioConfig, BioConverter
from biofx.model.sharding import shard_placement
from biofx.output.export import export
from biofx.output.fold import fold
from biofx.output.inspection import summary, table, to_networkx
from biofx.rewrite.verification import verify
from biofx.training.attachment import Attachment, attach, detach

__version__ = version("biofx")

__all__ = [
    "ArgumentError",
    "Attachment",
    "BioConfig",
    "BioConverter",
    "BiofxError",
    "CaptureError",
    "ExportError",
    "LifecycleError",
    "NotJudgedError",
    "PipelineError",
    "Units",
    "Verdict",
    "VerificationError",
    "WeightSite",
    "attach",
    "detach",
    "export",
    "fold",
    "l1",
    "passes",
    "shard_placement",
    "summary",
    "table",
    "to_networkx",
    "transform",
    "units",
    "verify",
    "weight_sites",
]
