"""Sparsity: a constant pull of every synapse towards zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from biofx.base.options import check_number
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.training.blocks import batches

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.training.plastic_weight import PlasticWeight


@register
@dataclass(frozen=True)
class L1Regularization(Pass):
    r"""Add the gradient of λ·Σ|w| to that of every synapse, before the optimizer's step.

    $$g \leftarrow g + \lambda \operatorname{sign}(w)$$

    with w the weight of a synapse; what is added is the derivative with respect to what is stored for it, which differs
    under `DalesPrinciple(constraint="softplus")`. It is added once for each step (`biofx.attach`), not in the backward
    pass: there it would be added once for each micro-batch, and divided by the loss scale. Gains act on it as on the
    rest of the gradient.

    `biofx.l1(bio)` is the differentiable sum over effective weights, for a loss. The reference package's `l1_reg` sums
    its own learning-rate factors, under `no_grad`.

    Args:
        strength: λ, at least 0.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(1, 1, bias=False), [passes.L1Regularization(strength=0.5)])
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=1.0)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> before = bio.weight.detach().clone()
        >>> (0 * bio(torch.ones(1))).sum().backward()
        >>> optimizer.step()
        >>> (bio.weight - before).item() == -0.5 * before.sign().item()
        True
    """

    name: ClassVar[str] = "l1-regularization"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # only gradients change
    moment: ClassVar[Moment] = Moment.GRADIENT
    works_on_shards: ClassVar[bool] = True

    strength: float = option(1e-4, check_number, at_least=0)

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Nothing to insert: the rule acts at the step."""

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Add the pull to the gradients."""
        for towards_zero in (-1, 1):
            group = [w for w in weights if bool(w.group.get("maximize")) is (towards_zero == -1)]
            for batch in batches([weight.gradient for weight in group]):
                own = [group[index] for index in batch]
                signs = zip(own, torch._foreach_sign([w.raw for w in own]), strict=True)
                pulls = [w.without_padding(sign if w.stores_magnitude else w.slope) for w, sign in signs]
                torch._foreach_add_([w.gradient for w in own], pulls, alpha=towards_zero * self.strength)
