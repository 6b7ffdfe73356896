r"""Balance: initial weights with which a network under Dale's principle starts like the network without it.

A row of weights is an excitatory part minus an inhibitory part, $w_i = a_i e_i - b_i f_i$, where $e_i, f_i \ge 0$ are
magnitudes of the original weights. Two factors for each row, $a_i$ and $b_i$, suffice to give its net input the
original mean and variance:

$$a \bar x - b \bar y = \mu, \qquad a^2 \mathrm{Var}(x) - 2ab\,\mathrm{Cov}(x, y) + b^2 \mathrm{Var}(y) = v \qquad (*)$$

with $x = e_i \cdot h$ and $y = f_i \cdot h$ the net input through each part, for presynaptic activity h. Rows are
sparse, because dense rows would all respond to the same common mode of their inputs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from biofx.analysis.sites import WeightSite, find_weights
from biofx.base.copying import copied
from biofx.model.chain import attribute
from biofx.model.synapses import stored
from biofx.signs.net_inputs import NetInput, NetInputRuns
from biofx.signs.spectrum import balanced_recurrent, singular_entropy, spectral_radius

if TYPE_CHECKING:
    from biofx.analysis.units import PresynapticUnits, Units
    from biofx.rewrite.model_editor import ModelEditor

MIN_SYNAPSES = 8  # of each sign in a row, if it has them: fewer cannot be balanced
MEAN_LIMIT = 0.9  # of the largest mean that a row can have for its variance
MAX_RESCALING = 4.0  # factor by which measured net inputs may change the size of a row
RECTIFIED = 1 / (torch.pi - 1)  # mean² / variance of a rectified normal variable
ROUNDING = 1e-26  # a variance below this fraction of mean² is rounding
TINY = 1e-300
BLOCK = 2**18  # entries of a weight that are computed at once, because there are a dozen temporaries of their size


def balance(model: ModelEditor, units: Units, signs: Mapping[str, Tensor], density: float) -> None:
    """Give weights the signs of their presynaptic units, and magnitudes that preserve the statistics of net inputs.

    First (*) is solved for each row as if all its inputs had one distribution. Then the network runs in evaluation mode
    on normal inputs: from the first weight to the last, the net input of each row is measured, and (*) is solved again
    for the measured moments. The bias absorbs the rest of the mean. Recurrent weights keep their spectral radius and
    the spread of their singular values (`balanced_recurrent`).

    Args:
        model: the model; the stored weights and biases change.
        units: its units.
        signs: sign of each presynaptic unit, +1, −1, or 0 if it is free, by the weight's name.
        density: fraction of each row's synapses that do not start at 0.
    """
    bio = _copy_in_double(model, signs)
    found = find_weights(bio).sites
    sites = {name: found[name] for name in signs}
    signs = {name: sign.to(sites[name].raw.device) for name, sign in signs.items()}
    blocks = {name: _recurrent_blocks(site, units.readings[name]) for name, site in sites.items()}
    biases = _biases(model, sites)
    targets: dict[str, tuple[Tensor, Tensor]] = {}

    def original(name: str) -> Tensor:
        return connections(model.sites[name])

    def measure(site: WeightSite, net_input: NetInput) -> None:
        sign = site.spread_presynaptic(signs[site.name])
        net = net_input(original(site.name) * (sign != 0))
        targets[site.name] = net.mean((0, 2)), net.var(0, correction=0).mean(1)

    def refit(site: WeightSite, net_input: NetInput) -> None:
        if site.name in targets:
            bias = biases.get(site.name)
            held = None if bias is None else attribute(bio, bias)
            _refit(site, net_input, signs[site.name], *targets[site.name], held)

    measured = {name: site for name, site in sites.items() if blocks[name] is None}
    changing = [*(site.raw for site in sites.values()), *(attribute(bio, bias) for bias in biases.values())]
    runs = NetInputRuns(model, bio, measured, changing)
    runs.visit(measure)
    for name, site in sites.items():
        generator, old = model.generator(name), site.incoming(original(name))
        if (own := blocks[name]) is None:
            sign = site.incoming(site.spread_presynaptic(signs[name]).expand(site.shape))
            rows = balanced_rows(old, sign, density, generator)
        else:
            rows = old.clone()
            for block in own:
                rows[block] = balanced_recurrent(old[block], signs[name].to(old), density, generator)
            model.edits[name].remark(_spectral_change(old, rows, own))
        model.edits[name].replace_raw(divided(site, site.from_incoming(rows)).to(model.sites[name].raw))
        site.raw.data = model.sites[name].raw.data.to(site.raw)
    runs.visit(refit)
    for name, site in sites.items():
        model.sites[name].raw.copy_(site.raw)
        site.raw.data = torch.empty(0)  # the copy is full of cycles, so it stays until garbage is collected
        if name in biases and biases[name] not in model.excluded:
            stored(model.bio, biases[name]).copy_(attribute(bio, biases[name]))


def _copy_in_double(model: ModelEditor, names: Iterable[str]) -> fx.GraphModule:
    """A copy of the model that runs in double, because in deep networks, samples differ in the eighth digit only.

    Weights that only the graph reads share their memory with the model's: the graph reads copies, one after the other.
    """
    sites = [site for name in names if not (site := model.sites[name]).inside]
    states = [state for site in sites if site.child is not None for state in site.child.buffers()]
    return copied(model.bio, torch.float64, [*(site.raw for site in sites), *states])


def _recurrent_blocks(site: WeightSite, reading: PresynapticUnits) -> list[Tensor] | None:
    """The rows of a recurrent weight, in the order of the units that they feed; one block for each gate.

    None if a row feeds a unit that the weight does not read, and for a convolution, which has several synapses for each
    pair of units.
    """
    returns = reading.returns
    count = len(reading.numbers)
    is_matrix = site.shape.numel() == site.units * site.presynaptic_units
    if not is_matrix or not count or len(returns) % count or bool((returns < 0).any()):
        return None
    blocks = returns.view(-1, count)
    if not all(torch.equal(block.sort().values, torch.arange(count)) for block in blocks):
        return None
    return [(index * count + block.argsort()).to(site.raw.device) for index, block in enumerate(blocks)]


def _spectral_change(before: Tensor, after: Tensor, blocks: list[Tensor]) -> str:
    """The spectral measures of recurrent weights before and after, in words; for each gate, if there are several."""
    measures = {"spectral radius": spectral_radius, "entropy of singular values": singular_entropy}
    numbers = {
        name: [", ".join(f"{measure(rows[block]):.3g}" for block in blocks) for rows in (before, after)]
        for name, measure in measures.items()
    }
    return "; ".join(f"{name} {old} → {new}" for name, (old, new) in numbers.items())


def balanced_rows(weight: Tensor, sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Sparse weights with given signs, whose rows keep their sum and their sum of squares.

    This solves (*) for inputs with a common mean and variance. A row whose synapses all have one sign cannot cancel the
    mean; it stays dense, and is scaled to the mean square net input of weights with random signs on rectified normal
    inputs.

    Args:
        weight: weights, shape (rows, synapses).
        sign: +1, −1, or 0 for free weights, which are not changed; same shape.
        density: fraction of the synapses of each sign that each row keeps, but at least `MIN_SYNAPSES`.
        generator: draws the synapses that are kept.
    """
    rows = max(1, BLOCK // max(1, weight.shape[1]))
    blocks = zip(weight.split(rows), sign.split(rows), strict=True)
    return torch.cat([_balanced_block(*block, density, generator) for block in blocks])


def _balanced_block(weight: Tensor, sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    old = weight.double() * (sign != 0)
    size = old.abs()
    kept = size * kept_synapses(sign, density, generator)
    e, f = kept * (sign > 0), kept * (sign < 0)
    total, energy = old.sum(1), old.square().sum(1)
    a, b = row_factors(e.sum(1), f.sum(1), e.square().sum(1), f.square().sum(1), torch.zeros(()), total, energy)
    new = a[:, None] * e - b[:, None] * f
    one_sign = ~((e > 0).any(1) & (f > 0).any(1))  # or none, such as the row of a padding token
    expected = energy + RECTIFIED * size.sum(1).square()
    gain = ((1 + RECTIFIED) * energy / (expected + TINY)).sqrt()
    new = torch.where(one_sign[:, None], sign * size * gain[:, None], new)
    return torch.where(sign == 0, weight.double(), new).to(weight.dtype)


def kept_synapses(sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Mask of the synapses that each row keeps: a random fraction of each sign."""
    draw = torch.rand(sign.shape, generator=generator, dtype=torch.float64).to(sign.device)
    mask = sign == 0
    for own in (sign > 0, sign < 0):
        count = own.sum(1, keepdim=True)
        keep = torch.minimum(count, (density * count).round().clamp(min=MIN_SYNAPSES)).long()
        drawn = draw.masked_fill(~own, 2.0)  # draws are below 1, so the other sign is never among the lowest
        if drawn.numel():  # −1 is below all draws: a row without synapses of this sign keeps none
            mask |= drawn <= drawn.sort(1).values.gather(1, (keep - 1).clamp(min=0)).where(keep > 0, -1.0)
    return mask


def row_factors(
    x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor, mean: Tensor, variance: Tensor, largest: float = 1e30
) -> tuple[Tensor, Tensor]:
    """The solution a, b ≥ 0 of (*) for each row: a·x − b·y = mean and a²·xx − 2ab·xy + b²·yy = variance.

    With B = b·y and a·x = B + mean, (*) is a quadratic equation for B. A mean without a solution is reduced to
    `MEAN_LIMIT` times the largest mean with one. If one common signal drives all inputs, every B is a solution, so b
    and B/x are limited to `largest`.
    """
    # In units of x and y, the equation is t·B² + 2u·B + v = 0; 1e-12 stands for a zero t, where every B is a solution.
    x, y = x + TINY, y + TINY
    p, r, c = xx / x**2, yy / y**2, xy / (x * y)
    mean = torch.minimum(torch.maximum(mean, -MEAN_LIMIT * (variance / r).sqrt()), MEAN_LIMIT * (variance / p).sqrt())
    t = (p + r - 2 * c).clamp(min=1e-12)
    u = mean * (p - c)
    root = (u.square() - t * (p * mean.square() - variance)).clamp(min=0).sqrt()
    lowest = (-mean).clamp(min=0)
    b = torch.maximum((root - u) / t, lowest)
    b = torch.minimum(b, torch.maximum(largest * torch.minimum(x, y), lowest))
    return (b + mean).clamp(min=0) / x, b / y


def _refit(
    site: WeightSite, net_input: NetInput, signs: Tensor, mean: Tensor, variance: Tensor, bias: Tensor | None
) -> None:
    """Solve (*) for measured net inputs."""
    weight = connections(site)
    sign = site.spread_presynaptic(signs).expand(site.shape)
    mx, x = _deviations(net_input(weight * sign.clamp(min=0).to(weight)))
    my, y = _deviations(net_input(weight * sign.clamp(max=0).to(weight)))
    xx, yy, xy = (_mean_product(*pair) for pair in ((x, x), (y, y), (x, y)))
    del x, y
    a, b = row_factors(mx, my, xx, yy, xy, mean, variance, MAX_RESCALING)
    is_constant = ~(torch.minimum(variance, xx + yy) > ROUNDING * (mean.square() + mx.square() + my.square()))
    unbalanced = (mx <= 0) | (my <= 0) | is_constant  # (*) needs inputs of both signs that vary
    a, b = a.masked_fill(unbalanced, 1.0), b.masked_fill(unbalanced, 1.0)
    # If `row_factors` reduced the mean, its solution misses the variance; `gain` corrects that.
    reached = a.square() * xx - 2 * a * b * xy + b.square() * yy
    gain = torch.where(reached > TINY, (variance / (reached + TINY)).sqrt(), 1.0)
    e, f = (site.incoming(weight * part).double().norm(dim=1) for part in (sign > 0, sign <= 0))
    gain = torch.minimum(gain, MAX_RESCALING * torch.hypot(e, f) / (torch.hypot(a * e, b * f) + TINY))
    gain = gain.masked_fill(is_constant, 1.0)
    e, f = (site.spread(factor * gain).to(weight) for factor in (a, b))
    site.raw.mul_(torch.where(sign > 0, e, f).masked_fill_(sign == 0, 1.0))
    if bias is not None:
        bias.add_(mean - gain * (a * mx - b * my))


def _deviations(net: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of net inputs, shape (samples, units, positions), for each unit, and deviations from that of samples."""
    mean = net.mean(0)
    return mean.mean(1), net.sub_(mean).float()


def _mean_product(x: Tensor, y: Tensor) -> Tensor:
    """The mean of the product over samples and positions, sample by sample, to save memory."""
    return torch.stack([(a * b).mean(1, dtype=torch.float64) for a, b in zip(x, y, strict=True)]).mean(0)


def connections(site: WeightSite, values: Tensor | None = None) -> Tensor:
    """The sum over the synapses of each connection: of values of synapses, or of what is stored."""
    values = site.raw.detach() if values is None else values
    return values.sum(0) if site.is_split else values


def divided(site: WeightSite, weight: Tensor) -> Tensor:
    """The weight of every synapse, from that of every connection, in proportion to the present magnitudes."""
    if not site.is_split:
        return weight
    size = site.raw.detach().abs()
    total = size.sum(0)
    return torch.where(total > 0, size / total, 1 / len(size)) * weight


def _biases(model: ModelEditor, sites: Mapping[str, WeightSite]) -> dict[str, str]:
    """The names of the biases of postsynaptic units that nothing else reads, by the weight's name."""
    assert model.understood is not None
    forms = model.understood.forms
    pairs = dict.fromkeys((read.parameter.name, forms.biases.get(read.operation)) for read in forms.reads)
    count = Counter(itertools.chain.from_iterable(pairs))
    return {
        name: bias
        for name, bias in pairs
        if bias is not None and count[name] == count[bias] == 1 and not forms.users.get(bias)
        if name in sites and attribute(sites[name].bio, bias).shape == (sites[name].units,)
    }
