"""Multi-synaptic connectivity: every connection is made of several synapses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from biofx.base.options import check_activation, check_choice, check_flag, check_integer
from biofx.model.chain import attribute
from biofx.model.slots import Slot
from biofx.rewrite.registry import Pass, option, register
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor


@register
@dataclass(frozen=True)
class SplitSynapses(Pass):
    r"""Split every connection into Γ synapses, which learn separately and act together.

    $$w = \sum_{\gamma=1}^{\Gamma} w_\gamma, \qquad w_\gamma = \pi_\gamma\, w \ \text{at insertion}, \qquad
    \pi \sim \mathrm{Dirichlet}(1, \ldots, 1) \ \text{for each connection}$$

    The parameter gets a leading axis of synapses: shape (Γ, \*shape). The model computes what it did before, to
    rounding; with Γ = 1, to the last bit.

    *Learning speed.* Each synapse sees the whole gradient of its connection, so under gradient descent the connection
    would move Γ times as fast. `compensate` multiplies the gradient by 1/Γ, before the gain.

    *Per-synapse activation.* With `activation=f`, synapses act on the unit through a nonlinearity of their own:

    $$y = \sum_{\gamma=1}^{\Gamma} f\!\left(x\, w_\gamma^{\top} + b_\gamma\right), \qquad b_\gamma = b / \Gamma
    \ \text{at insertion},$$

    computed by one operator with Γ times as many outputs, a reshape, f, and a sum. The bias becomes (Γ, \*shape) as
    well. This does **not** preserve the function.

    The reference package has nothing of this kind: its "weight splitting" sums groups of units.

    Args:
        synapses: Γ, the number of synapses for each connection, at least 1.
        init: `"dirichlet"` divides a connection at random, as above; `"equal"` gives every synapse w/Γ. Synapses that
            start equal stay equal unless something, such as `FuzzyLearningRates`, makes them differ.
        compensate: keep the connection's learning speed independent of Γ.
        activation: f, by its name in `torch.nn.functional` or `torch`, or a module or function; None is the plain sum.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Conv2d(3, 8, kernel_size=3)
        >>> bio = biofx.transform(model, [passes.SplitSynapses(synapses=4)])
        >>> bio.weight_synapses.weight.shape, bio.weight.shape
        (torch.Size([4, 8, 3, 3, 3]), torch.Size([8, 3, 3, 3]))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(bio(x), model(x), atol=1e-5)
        True

    References:
        Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
        networks, Nature Communications 16, 2025, doi 10.1038/s41467-025-60078-9.
    """

    name: ClassVar[str] = "split-synapses"
    slot: ClassVar[Slot] = Slot.SUM

    synapses: int = option(2, check_integer, at_least=1)
    init: str = option("dirichlet", check_choice, choices=("dirichlet", "equal"))
    compensate: bool = option(True, check_flag)
    activation: Any = option(None, check_activation)

    @property
    def preserves_function(self) -> bool:  # type: ignore[override]
        """True without a per-synapse activation."""
        return self.activation is None

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Store Γ synapses, and sum them on the way to the operator or behind it."""
        reason = None if self.activation is None else _why_no_activation(site)
        if reason is not None:
            edit.leave(reason)
            return
        shares = dirichlet if self.init == "dirichlet" else equal
        dtype = torch.promote_types(site.raw.dtype, torch.float32)
        edit.replace_raw(split(site.raw, shares(self.synapses, site.raw.shape, edit.generator, dtype)))
        self._share_gradient(edit)
        if self.activation is None:
            edit.insert(torch.sum, 0)
        else:
            assert site.postsynaptic_axis is not None
            _stack(edit, site.postsynaptic_axis, site.groups)
            for bias in site.biases:
                self._split_bias(edit.on(bias), site.groups)
            for call in site.calls:
                _sum_outputs(edit, call.node, call.use.output_axes[-1], site.groups, self.synapses, self.activation)

    def _split_bias(self, edit: Editor, groups: int) -> None:
        edit.replace_raw((edit.raw / self.synapses).expand(self.synapses, -1))
        self._share_gradient(edit)
        _stack(edit, 0, groups)

    def _share_gradient(self, edit: Editor) -> None:
        if self.synapses > 1:
            # It stands before the sum, which hands all synapses one gradient in memory: each gets its own here.
            edit.insert(torch.ops.biofx.share_grad, 1 / self.synapses if self.compensate else 1.0)


def dirichlet(
    synapses: int, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    r"""Shares π of Γ synapses in every connection, uniform on the simplex: shape (Γ, \*shape), summing to 1 over Γ.

    Independent exponential variables, divided by their sum, are Dirichlet(1, …, 1).
    """
    uniform = torch.empty(synapses, *shape).uniform_(2**-25, 1, generator=generator)  # never 0
    uniform.clamp_(max=1 - 2**-24)  # before PyTorch 2.13, one in 16 million is 1
    waiting = uniform.to(dtype).neg_().log1p_()  # which takes a quarter of the time of exponential_; signs cancel
    return waiting.div_(waiting.sum(0))


def equal(synapses: int, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Equal shares: shape (Γ, \*shape)."""
    return torch.full((synapses, *shape), 1 / synapses, dtype=dtype)


def split(weight: Tensor, shares: Tensor) -> Tensor:
    r"""Synapses w_γ = π_γ·w of a weight, in the place of the shares: (Γ, \*shape), in its dtype and on its device."""
    return shares.mul_(weight.detach().to(shares)).to(weight.device, weight.dtype)


def _why_no_activation(site: WeightSite) -> str | None:
    """Why the synapses of a weight cannot have an activation each, or None if they can."""
    if site.unmet(Need.NODES) is not None or site.axes is None:
        return site.unmet(Need.NODES) or site.unmet(Need.AXES)
    own = [factor for factor in site.axes.factors if factor.postsynaptic and not factor.is_group]
    if len(own) != 1 or not all(call.use.output_axes for call in site.calls):
        return f"{site.operator} does not return its units on one axis"
    if any(call.computes_bias for call in site.calls):
        return "its operator's bias is computed, so it cannot be split"
    if set(site.chain[-1].users) != set(site.uses):
        return "something else than its operator reads the weight, so it has no place for an activation"
    readers = {reader for bias in site.biases for reader in bias.users}
    is_plain = all(
        b.op == "get_attr" and attribute(site.bio, str(b.target)).shape == (site.units,) for b in site.biases
    )
    if len(site.biases) > 1 or not is_plain or not readers <= set(site.uses):
        return "its operator's bias is computed, or shared with something else, so it cannot be split"
    return None


def _stack(edit: Editor, axis: int, groups: int) -> None:
    """Lay the synapses side by side on the postsynaptic axis, within each group of units."""
    if groups > 1 and axis == 0:
        edit.insert(torch.unflatten, 1, (groups, -1))
        edit.insert(torch.movedim, 0, 1)
        edit.insert(torch.flatten, 0, 2)
        return
    if axis > 0:  # in a transposed convolution, this axis runs over the units of one group
        edit.insert(torch.movedim, 0, axis)
    edit.insert(torch.flatten, axis, axis + 1)


def _sum_outputs(edit: Editor, use: fx.Node, axis: int, groups: int, synapses: int, activation: Any) -> None:
    """Behind the wide operator: apply the activation to each synapse's current, and sum over synapses."""
    node = edit.after(use, torch.unflatten, axis, (synapses, -1) if groups == 1 else (groups, synapses, -1))
    node = edit.activate(node, activation)
    outer = axis - 1 if axis < 0 else axis + (groups > 1)
    node = edit.after(node, torch.sum, outer)
    if groups > 1:
        edit.after(node, torch.flatten, axis - 1, axis)
