"""Weight splitting of the paper: groups of units act as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from biofx.base.errors import PipelineError
from biofx.base.options import check_activation, check_integer
from biofx.model.slots import Slot
from biofx.rewrite.registry import Pass, option, register
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.rewrite.model_editor import ModelEditor


@register
@dataclass(frozen=True)
class GroupUnits(Pass):
    r"""Sum groups of adjacent units, and give every unit of a group the sum.

    $$y_i = \sum_{j \,\in\, \mathrm{group}(i)} f(z_j)$$

    with z the operator's output (the axis of postsynaptic units is divided into groups of Γ adjacent units) and f the
    `activation`. Shapes do not change. Every connection between two groups is thus made of Γ² weights. This does not
    preserve the function. The model's output layers, behind which there is no other weight, are left alone.

    The reference package does the same, but takes 2-D inputs of linear layers and 4-D inputs of convolutions only,
    checks the number of *input* features of a linear layer instead of its outputs, and finds the output layer only
    among the direct children of the model.

    Args:
        size: Γ, the number of units of a group, at least 1.
        activation: f, by its name in `torch.nn.functional` or `torch`, or a module or function; None is the identity.

    Raises:
        ArgumentError: an option out of its range.
        PipelineError: at transform, if Γ does not divide a layer's number of units.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
        >>> bio = biofx.transform(model, [passes.GroupUnits(size=2)])
        >>> x = torch.randn(3, 2)
        >>> z = model[0](x)
        >>> y = torch.stack([z[:, 0] + z[:, 1]] * 2 + [z[:, 2] + z[:, 3]] * 2, dim=1)
        >>> torch.allclose(bio(x), model[1](y))
        True

    References:
        Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
        networks, Nature Communications 16, 2025, doi 10.1038/s41467-025-60078-9.
    """

    name: ClassVar[str] = "group-units"
    slot: ClassVar[Slot] = Slot.OUTPUT

    size: int = option(2, check_integer, at_least=1)
    activation: Any = option(None, check_activation)

    def rewrite_model(self, model: ModelEditor) -> None:
        """Group the units of every weight; the passes that follow see each group as one unit."""
        super().rewrite_model(model)
        if any(edit.changed for edit in model.edits.values()):
            model.look_again()

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Group what every use of the weight returns."""
        if site.is_output:
            edit.leave("it is an output layer")
            return
        reason = site.unmet(Need.NODES) or site.unmet(Need.AXES)
        if reason is not None or not all(call.use.output_axes for call in site.calls):
            edit.leave(reason or f"{site.operator} returns no axis of units")
            return
        for units in (call.use.adjacent for call in site.calls):
            if units % self.size:
                raise PipelineError(
                    f"group-units: {site.name} has {units} postsynaptic units, not a multiple of {self.size}; "
                    f'choose another size, or leave the weight alone with exclude="{site.name}"'
                )
        for output, call in zip(site.outputs, site.calls, strict=True):
            axis = call.use.output_axes[-1]
            node = output if self.activation is None else edit.activate(output, self.activation)
            node = edit.after(node, torch.unflatten, axis, (-1, self.size))
            node = edit.after(node, torch.sum, axis if axis < 0 else axis + 1)
            edit.after(node, torch.repeat_interleave, self.size, axis)
