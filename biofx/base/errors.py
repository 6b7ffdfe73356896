"""Everything that biofx raises; each message names what was given, where, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class BiofxError(Exception):
    """Base of every error that biofx raises on purpose."""


class ArgumentError(BiofxError, ValueError):
    """An argument that makes no sense."""


class InputError(ArgumentError):
    """Inputs of another form than those for which a graph was captured."""


class CaptureError(BiofxError):
    """A model whose forward cannot be turned into a graph."""


class PipelineError(BiofxError, ValueError):
    """A list of passes that cannot be run: unknown names or options, or passes that exclude each other."""


class VerificationError(BiofxError):
    """A transformed model that breaks an invariant.

    Attributes:
        violations: one line for each broken invariant; names the pass, the parameter and the invariant.
    """

    def __init__(self, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        super().__init__("the transformed model is not valid:\n" + "\n".join(f"  - {v}" for v in self.violations))


class NotJudgedError(BiofxError):
    """An answer that cannot be given, because some weights could not be judged.

    Attributes:
        reasons: why, by the weight's name.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = "\n".join(f"  - {name}: {reason}" for name, reason in self.reasons.items())
        super().__init__(
            "no unit was found that excites and inhibits, but these weights could not be judged; "
            f"Units.verdicts() tells what is known of each weight:\n{lines}"
        )


class ExportError(BiofxError):
    """An export that failed, a file that computes something other than the model, or a missing package."""


class SavingError(BiofxError):
    """A model that cannot be saved, or saved files that are damaged or cannot be read."""


class LifecycleError(BiofxError):
    """A step of an optimizer around which rules cannot act; it changed nothing."""
