r"""Balance: magnitudes with which a network whose units have signs starts like the one without.

A row of weights is an excitatory part minus an inhibitory part, $w_i = a_i e_i - b_i f_i$ with $e_i, f_i \ge 0$ taken
from the magnitudes of the weights that are there. Two numbers for each row, $a_i$ and $b_i$, are enough to give its net
input the mean and the variance that it had:

$$a \bar x - b \bar y = \mu, \qquad a^2 \mathrm{Var}(x) - 2ab\,\mathrm{Cov}(x, y) + b^2 \mathrm{Var}(y) = v \qquad (*)$$

with $x = e_i \cdot h$ and $y = f_i \cdot h$ the net input through each part, for presynaptic activity h. Rows are
sparse, because the rows of a dense one would all listen to the same common mode of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from biofx.chain import attribute, compute
from biofx.copying import copied
from biofx.dry_run import UNKNOWN, Guesser
from biofx.model_editor import ModelEditor
from biofx.trial import undisturbed
from biofx.weights.operators import BATCH, Source
from biofx.weights.paths import Constants, Use
from biofx.weights.sites import WeightSite, find

LEAST = 8  # synapses of each kind that a row keeps, if it has them: fewer cannot be balanced
SAMPLES = 256  # in the batch on which net inputs are measured, at most, and
POSITIONS = 4096  # as many as have so many positions in time and space, which are samples of a kind, but
FEWEST = 32  # at least
SLACK = 0.9  # how much of the largest mean that a row can have for its variance it gets at most
LARGEST = 4.0  # factor by which measuring may change the size of a row
RECTIFIED = 1 / (torch.pi - 1)  # mean² / variance of a rectified normal variable
STILL = 1e-26  # below this fraction of mean², a variance is rounding
TINY = 1e-300


def balance(model: ModelEditor, signs: Mapping[str, Tensor], density: float) -> None:
    """Give weights the signs of their units, and magnitudes with which the network starts as it would without signs.

    First every row gets what (*) says for inputs that are alike in distribution. Then the network is run, in
    evaluation mode, on normal inputs: from the first weight to the last, the net input of each row is measured, and (*)
    is solved again for what arrives. What is left of the mean moves into the bias.

    Args:
        model: the model; the stored weights and biases change.
        signs: signs of the presynaptic units, +1, −1 or 0 where free, by the weight's name.
        density: fraction of each row's synapses that do not start at 0.
    """
    bio = copied(model.bio).double()  # deep networks tell samples apart in the eighth digit
    found = find(bio)[0]
    sites = {name: found[name] for name in signs}
    signs = {name: sign.to(sites[name].raw.device) for name, sign in signs.items()}
    original = {name: _connections(site).clone() for name, site in sites.items()}
    targets: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(site: WeightSite, net_input: NetInput) -> None:
        sign = site.spread_presynaptic(signs[site.name])
        net = net_input(original[site.name] * (sign != 0))
        targets[site.name] = net.mean((0, 2)), net.var(0, correction=0).mean(1)

    def refit(site: WeightSite, net_input: NetInput) -> None:
        if site.name in targets:
            _refit(site, net_input, signs[site.name], *targets[site.name])

    _run(model, bio, found, sites, measure)
    for name, site in sites.items():
        sign = site.incoming(site.spread_presynaptic(signs[name]).expand(site.shape))
        rows = balanced(site.incoming(original[name]), sign, density, model.generator(name))
        _store(site, site.from_incoming(rows))
    _run(model, bio, found, sites, refit)
    for name, site in sites.items():
        model.sites[name].raw.copy_(site.raw)
        bias = _bias(site, site.calls[0]) if site.calls else None
        if bias is not None and bias not in model.excluded:
            model.value(bias).copy_(attribute(bio, bias))


def balanced(weight: Tensor, sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Sparse weights with given signs, whose rows have the sum and the sum of squares that they had.

    For inputs of one mean and one variance that is (*). A row whose inputs have all one sign cannot cancel them; it
    stays dense, and is scaled to the mean square net input that weights of random signs have, for rectified normal
    inputs.

    Args:
        weight: weights, shape (rows, synapses).
        sign: +1, −1, or 0 for free ones, which stay as they are; same shape.
        density: fraction of the synapses of each sign that is kept in each row, but at least `LEAST`.
        generator: chooses those that are kept.
    """
    old = weight.double() * (sign != 0)
    size = old.abs()
    kept = size * sparse(sign, density, generator)
    e, f = kept * (sign > 0), kept * (sign < 0)
    total, energy = old.sum(1), old.square().sum(1)
    a, b = scales(e.sum(1), f.sum(1), e.square().sum(1), f.square().sum(1), torch.zeros(()), total, energy)
    new = a[:, None] * e - b[:, None] * f
    one_sign = ~((e > 0).any(1) & (f > 0).any(1))  # or no weight at all, as the token for padding has none
    expected = energy + RECTIFIED * size.sum(1).square()
    gain = ((1 + RECTIFIED) * energy / (expected + TINY)).sqrt()
    new = torch.where(one_sign[:, None], sign * size * gain[:, None], new)
    return torch.where(sign == 0, weight.double(), new).to(weight.dtype)


def sparse(sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Mask of the synapses that each row keeps: of each sign the same fraction, at random."""
    draw = torch.rand(sign.shape, generator=generator, dtype=torch.float64).to(sign.device)
    mask = sign == 0
    for own in (sign > 0, sign < 0):
        count = own.sum(1, keepdim=True)
        keep = torch.minimum(count, (density * count).round().clamp(min=LEAST))
        rank = draw.masked_fill(~own, 2.0).argsort(1).argsort(1)
        mask = mask | (own & (rank < keep))
    return mask


def scales(
    x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor, mean: Tensor, variance: Tensor, largest: float = 1e30
) -> tuple[Tensor, Tensor]:
    """The solution a, b ≥ 0 of (*) for each row: a·x − b·y = mean and a²·xx − 2ab·xy + b²·yy = variance.

    With B = b·y and a·x = B + mean, (*) is one quadratic equation for B. A mean for which it has no solution is cut to
    `SLACK` times the largest that has one. If one common signal drives all inputs, every B fits, so b and B/x are kept
    below `largest`.
    """
    x, y = x + TINY, y + TINY
    p, r, c = xx / x**2, yy / y**2, xy / (x * y)
    mean = torch.minimum(torch.maximum(mean, -SLACK * (variance / r).sqrt()), SLACK * (variance / p).sqrt())
    t = (p + r - 2 * c).clamp(min=1e-12)
    u = mean * (p - c)
    root = (u.square() - t * (p * mean.square() - variance)).clamp(min=0).sqrt()
    lowest = (-mean).clamp(min=0)
    b = torch.maximum((root - u) / t, lowest)
    b = torch.minimum(b, torch.maximum(largest * torch.minimum(x, y), lowest))
    return (b + mean).clamp(min=0) / x, b / y


def _refit(site: WeightSite, net_input: NetInput, signs: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Solve (*) for the net input that is measured."""
    weight = _connections(site)
    sign = site.spread_presynaptic(signs).expand(site.shape)
    x, y = net_input(weight * (sign > 0)), net_input(-weight * (sign < 0))
    mx, my = x.mean(0, keepdim=True), y.mean(0, keepdim=True)
    xx, yy, xy = (v.mean((0, 2)) for v in ((x - mx).square(), (y - my).square(), (x - mx) * (y - my)))
    mx, my = mx.mean((0, 2)), my.mean((0, 2))
    a, b = scales(mx, my, xx, yy, xy, mean, variance, LARGEST)
    still = ~(torch.minimum(variance, xx + yy) > STILL * (mean.square() + mx.square() + my.square()))
    unbalanced = (mx <= 0) | (my <= 0) | still  # there are inputs of one sign only, or none that tell samples apart
    a, b = a.masked_fill(unbalanced, 1.0), b.masked_fill(unbalanced, 1.0)
    # A mean that was cut leaves the variance behind.
    reached = a.square() * xx - 2 * a * b * xy + b.square() * yy
    gain = torch.where(reached > TINY, (variance / (reached + TINY)).sqrt(), 1.0)
    rows, row_sign = site.incoming(weight), site.incoming(sign)
    scaled = rows * torch.where(row_sign > 0, a[:, None], b[:, None])
    gain = torch.minimum(gain, LARGEST * rows.norm(dim=1) / (scaled.norm(dim=1) + TINY))
    gain = gain.masked_fill(still, 1.0)
    new = torch.where(row_sign == 0, rows, scaled * gain[:, None])
    _store(site, site.from_incoming(new))
    bias = _bias(site, site.calls[0])
    if bias is not None:
        attribute(site.bio, bias).add_(mean - gain * (a * mx - b * my))


NetInput = Callable[[Tensor], Tensor]
"""Net input of the postsynaptic units through a weight, without their bias, shape (samples, units, positions)."""

See = Callable[[WeightSite, NetInput], None]


def _run(
    model: ModelEditor,
    bio: fx.GraphModule,
    all_sites: dict[str, WeightSite],
    sites: Mapping[str, WeightSite],
    see: See,
) -> None:
    """Run a copy of the network on normal inputs, and show what arrives at the first use of each weight."""
    generator = model.generator("inputs")
    seen = [site for site in sites.values() if site.calls and site.calls[0].call.units == site.units]
    first = {site.calls[0].node: site for site in seen}
    with undisturbed(bio), torch.no_grad():
        bio.eval()
        _Watched(bio, all_sites, _normal_inputs(model, all_sites, generator), first, see, generator).run()


class _Watched(Guesser):
    """Runs a graph on given inputs, as far as it can; what is not known is normal, behind a weight rectified."""

    def __init__(
        self,
        bio: fx.GraphModule,
        all_sites: dict[str, WeightSite],
        inputs: dict[str, Any],
        first: dict[fx.Node, WeightSite],
        see: See,
        generator: torch.Generator,
    ) -> None:
        self._generator = generator
        super().__init__(bio, all_sites, inputs)
        self._first = first
        self._see = see
        self.kept = {source for site in first.values() for source in _read_beside(site)}

    def input_of(self, site: WeightSite, source: Source) -> Tensor:
        """Standard normal activity; behind a weight, rectified."""
        fitting = super().input_of(site, source)
        if source.is_tokens:
            return fitting
        shape = fitting.shape
        if source.like[0] == BATCH:
            shape = torch.Size([_samples(shape), *shape[1:]])
        draw = torch.randn(shape, generator=self._generator, dtype=torch.float64).to(site.raw.device)
        return draw.relu() if site.depth > 0 else draw

    def before(self, node: fx.Node) -> None:
        """Look at the activity that arrives, if it is that of enough samples."""
        super().before(node)
        if node not in self._first:
            return
        site = self._first[node]
        source = site.calls[0].call.source
        if source is None:
            return
        self.env[source.node] = activity = self.env[source.node].to(site.raw.dtype)  # whatever forward casts it to
        has_samples = all(axis % activity.dim() > 0 for axis in source.axes)
        if activity.shape[0] < FEWEST or not has_samples:
            return
        beside = {source: self.env[source] for source in _read_beside(site)}
        self._see(site, partial(_net_input, site, beside))
        self.env[site.calls[0].call.weight] = _as_read(site, beside, site.effective())


def _read_beside(site: WeightSite) -> list[fx.Node]:
    """What the first use of a weight reads beside the weight: its activation, and what its path depends on."""
    use = site.calls[0]
    nodes = [use.node, *(step.node for step in use.path)]
    own = {*nodes, site.chain[-1], use.call.bias}
    return [source for node in nodes for source in node.all_input_nodes if source not in own]


def _normal_inputs(
    model: ModelEditor, all_sites: Mapping[str, WeightSite], generator: torch.Generator
) -> dict[str, Any]:
    """Standard normal inputs for a batch of the shapes that the model takes; what else it takes is left out."""
    device = min(all_sites.values(), key=lambda site: site.uses[0]).raw.device  # of the weight that is used first
    result: dict[str, Any] = {}
    for node in model.bio.graph.find_nodes(op="placeholder"):
        value = model.values[node]
        if value is UNKNOWN:
            continue
        if isinstance(value, Tensor):
            if value.dim() < 2 or not value.is_floating_point():
                continue
            shape = (_samples(value.shape), *value.shape[1:])
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        result[str(node.target).lstrip("*")] = value
    return result


def _samples(shape: torch.Size) -> int:
    """Number of samples of a shape, whose first axis runs over samples and second over units, that tell enough."""
    return max(FEWEST, min(SAMPLES, POSITIONS // max(1, shape[2:].numel())))


def _net_input(site: WeightSite, beside: Mapping[fx.Node, Any], weight: Tensor) -> Tensor:
    operator = site.calls[0].call
    known: dict[fx.Node, Any] = {**beside, operator.weight: _as_read(site, beside, weight)}
    if isinstance(operator.bias, fx.Node):
        known[operator.bias] = weight.new_zeros(1) if "add" in operator.name else None
    arguments = fx.map_arg((operator.node.args, operator.node.kwargs), known.__getitem__)
    net: Tensor = compute(site.bio, operator.node, *arguments)
    axes = operator.output_axes
    net = net.movedim(axes, list(range(1, 1 + len(axes)))) if axes else net[:, None]
    return net.flatten(1, max(1, len(axes))).unsqueeze(-1).flatten(2)


def _as_read(site: WeightSite, beside: Mapping[fx.Node, Any], weight: Tensor) -> Tensor:
    """A weight as its first use reads it, at the end of its path."""
    end = site.calls[0].call.weight
    return Constants(site.bio, {**beside, site.chain[-1]: weight})(end)  # type: ignore[no-any-return]


def _connections(site: WeightSite) -> Tensor:
    """The weight of every connection, whatever it does behind the sum over its synapses."""
    raw = site.raw.detach()
    return raw.sum(0) if site.is_split else raw


def _store(site: WeightSite, weight: Tensor) -> None:
    """Store the weight of every connection; its synapses keep their shares."""
    raw = site.raw
    if not site.is_split:
        raw.copy_(weight)
        return
    size = raw.abs()
    whole = size.sum(0)
    raw.copy_(torch.where(whole > 0, size / whole, 1 / len(raw)) * weight)


def _bias(site: WeightSite, use: Use) -> str | None:
    """Name of the bias of the postsynaptic units, if it is theirs alone."""
    bias = use.call.bias
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) > 1:
        return None
    name = str(bias.target)
    return name if attribute(site.bio, name).shape == (site.units,) else None
