"""biofx: a torch.fx compiler that gives the synapses of a PyTorch model biological properties."""

from importlib.metadata import version

from biofx import passes
from biofx.converter import BioConfig, BioConverter
from biofx.errors import (
    ArgumentError,
    BiofxError,
    CaptureError,
    ExportError,
    LifecycleError,
    NotJudgedError,
    PipelineError,
    VerificationError,
)
from biofx.export import export
from biofx.fold import fold
from biofx.inspection import summary, table, to_networkx
from biofx.model.sharding import shard_placement
from biofx.training.attachment import Attachment, attach, detach
from biofx.transform import transform
from biofx.units import Units, units
from biofx.verdict import Verdict
from biofx.verify import verify
from biofx.weights.sites import WeightSite, l1, weight_sites

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
