"""Exponentiated gradient: synapses grow and shrink by factors, not by amounts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from biofx.base.options import check_number
from biofx.model.provenance import record_of
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.signs.balance import connections
from biofx.signs.constraints import CONSTRAINTS, constraint_of
from biofx.training.blocks import batches
from biofx.training.compiling import over_blocks

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.training.plastic_weight import PlasticWeight

LIMIT = 1.0  # of the exponent


@register
@dataclass(frozen=True)
class ExponentiatedGradient(Pass):
    r"""Turn the additive updates of an optimizer into multiplicative ones, so that no synapse changes its sign.

    $$w \leftarrow w\, e^{s\,\Delta / \sigma}, \qquad s = \operatorname{sign}(w), \qquad \Delta = w_\mathrm{new} - w$$

    with w the stored weight before the step, Δ the update of the optimizer after gains acted on it (`biofx.attach`),
    and σ `scale`. With `SGD(lr=η)`, Δ is −η·g, and with σ = 1 this is the rule of the paper,
    $w\, e^{-\eta\, s\, g}$. Other optimizers propose another Δ, as in the paper's AdamW.

    *Scale.* To first order a synapse moves by Δ·|w|/σ, so one of size σ learns as fast as it would without this pass,
    larger ones faster and smaller ones slower. By default σ is the root mean square of the weight's connections that
    are not 0, at insertion, so a learning rate that suits the optimizer suits this pass as well. The paper has σ = 1
    and learning rates to match: weights are much smaller than 1, so at the same learning rate they learn slowly.

    *Signs.* They are kept without `DalesPrinciple`; with it, they are those of the presynaptic units, and the
    projection finds nothing to do. Its constraint `"softplus"` stores no magnitudes, so such weights are left alone.

    *Zeros.* A synapse of 0 stays 0; `summary` says how many there are. A weight of nothing else is left alone.
    `DalesPrinciple(balance=True)` starts with many: they stay silent, so connections stay as sparse as they are.

    *Together with other rules.* A gain c acts on Δ, so it is a gain in log space: the factor becomes
    $e^{c\, s\, \Delta / \sigma}$. With `SplitSynapses`, all synapses of a connection change by the factor of the
    connection, so it moves as it would unsplit, except for weight decay. Under `SGD`, `L1Regularization` multiplies
    every weight by $e^{-\eta\lambda/\sigma}$, which is the weight decay that the paper combines with `SGD`. Decoupled
    weight decay λ is a part of Δ, so it becomes the factor $e^{-\eta\lambda|w|/\sigma}$: it holds large weights back,
    and hardly touches small ones. The paper's AdamW multiplies w by 1 − ηλ instead.

    *Large steps.* The exponent is clipped to ±1, which the paper does not do: a step changes a synapse by a factor of e
    at most, and nothing overflows. Growth still compounds: what has grown learns faster. So the largest learning rate
    that an optimizer tolerates can be too large with this pass. In bfloat16, exponents below 2⁻⁹ are lost to rounding.

    Biases and other parameters that are not weights learn as without this pass. An optimizer that keeps a copy of the
    weights would undo it, so `attach` refuses that. Without `attach` it does nothing.

    The reference package has nothing of this kind.

    Args:
        scale: σ, above 0, in the units of the weight; None is the root mean square, separately for each weight.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(3, 1, bias=False), [passes.ExponentiatedGradient(scale=1.0)])
        >>> with torch.no_grad():
        ...     _ = bio.weight.copy_(torch.tensor([[1.0, -1.0, 0.0]]))
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=1.0)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> bio(torch.ones(1, 3)).sum().backward()  # the gradient is 1
        >>> optimizer.step()
        >>> bio.weight.detach()  # e⁻¹, −e¹, 0
        tensor([[ 0.3679, -2.7183,  0.0000]])

    References:
        Cornford, Pogodin, Ghosh, Sheng, Bicknell, Codol, Clark, Lajoie & Richards, Brain-like learning with
        exponentiated gradients, bioRxiv 2024, doi 10.1101/2024.10.25.620272, and their code, github.com/linclab/
        EG_optimiser. Kivinen & Warmuth, Exponentiated gradient versus gradient descent for linear predictors,
        Information and Computation 132, 1997.
    """

    name: ClassVar[str] = "exponentiated-gradient"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # only learning changes
    moment: ClassVar[Moment] = Moment.UPDATE
    works_on_shards: ClassVar[bool] = True

    scale: float | None = option(None, check_number, above=0)

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Keep the scale; the rule acts at the step."""
        if constraint_of(site) is CONSTRAINTS["softplus"]:
            edit.leave('its constraint "softplus" does not store magnitudes; use "project" or "abs"')
            return
        for run in record_of(site.bio).passes:
            if run.pass_.sets_zeros and site.name in run.weights:
                edit.leave(f"{run.pass_.name} sets some of its synapses to 0, which could never grow under this rule")
                return
        zeros = site.raw.numel() - int(site.raw.count_nonzero())
        if zeros == site.raw.numel():
            edit.leave("all its synapses are 0, and this rule leaves them so")
            return
        if zeros:
            edit.remark(f"{zeros} of its {site.raw.numel()} synapses are 0, and stay so")
        scale = typical_size(site) if self.scale is None else torch.tensor(self.scale, dtype=torch.float64)
        edit.keep("scale", scale.to(site.raw.dtype))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Multiply weights instead of adding to them."""
        for batch in batches([weight.raw for weight in weights]):
            own = [weights[index] for index in batch]
            # Of Γ synapses, the optimizer sees each as the connection, and moves it by 1/Γ of that.
            scales = [weight.state("scale") / weight.synapses.shares for weight in own]
            raws, olds = [weight.raw for weight in own], [weight.old for weight in own]
            over_blocks(exponentiated, multiply_, raws, olds, scales, compiled=own[0].compiled)

    def violations(self, site: WeightSite) -> Iterator[str]:
        """The scale is a positive number."""
        scale = site.state("scale")
        if scale is None or not 0 < float(scale) < math.inf:
            yield f"its scale is not a positive number ({scale})"


def typical_size(site: WeightSite) -> Tensor:
    """The root mean square of the connections of a weight that are not 0, in double precision."""
    sizes = connections(site, site.raw.detach().double().abs())
    return sizes[sizes > 0].square().mean().sqrt()


def exponentiated(weight: Tensor, old: Tensor, scale: Tensor) -> Tensor:
    """w·exp(s·Δ/σ), for a weight after and before an additive update."""
    exponent = (weight - old) / scale * old.sign()
    return old * exponent.clamp(-LIMIT, LIMIT).exp()


def multiply_(weights: list[Tensor], olds: list[Tensor], scales: list[Tensor]) -> None:
    """The same for many weights, in place."""
    torch._foreach_sub_(weights, olds)
    torch._foreach_div_(weights, scales)
    torch._foreach_mul_(weights, torch._foreach_sign(olds))
    torch._foreach_clamp_min_(weights, -LIMIT)
    torch._foreach_clamp_max_(weights, LIMIT)
    torch._foreach_exp_(weights)
    torch._foreach_mul_(weights, olds)
