r"""Balance: magnitudes with which a network whose units have signs starts like the one without.

A row of weights is an excitatory part minus an inhibitory part, $w_i = a_i e_i - b_i f_i$ with $e_i, f_i \ge 0$ taken
from the magnitudes of the weights that are there. Two numbers for each row, $a_i$ and $b_i$, are enough to give its net
input the mean and the variance that it had:

$$a \bar x - b \bar y = \mu, \qquad a^2 \mathrm{Var}(x) - 2ab\,\mathrm{Cov}(x, y) + b^2 \mathrm{Var}(y) = v \qquad (*)$$

with $x = e_i \cdot h$ and $y = f_i \cdot h$ the net input through each part, for presynaptic activity h. Rows are
sparse, because the rows of a dense one would all listen to the same common mode of their inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from biofx.analysis.forms import Forms, Read
from biofx.analysis.graphs import as_recorded_graph
from biofx.analysis.replay import Moment, Replay
from biofx.analysis.sites import WeightSite, find_weights
from biofx.analysis.understanding import Run, Understanding, call
from biofx.base.copying import copied
from biofx.model.chain import attribute
from biofx.recording.operations import Depends, Recording
from biofx.recording.recorder import Recorder, recording_of
from biofx.signs.spectrum import balanced_recurrent, singular_entropy, spectral_radius

if TYPE_CHECKING:
    from biofx.analysis.units import Reading, Units
    from biofx.rewrite.model_editor import ModelEditor

LEAST = 8  # synapses of each kind that a row keeps, if it has them: fewer cannot be balanced
SAMPLES = 256  # in the batch on which net inputs are measured, at most, and
POSITIONS = 4096  # as many as have so many positions in time and space, which are samples of a kind, but
FEWEST = 32  # at least
MORE, MARGIN = 2, 100  # operators than with the example inputs: if there are more, it was no axis of samples that grew
SLACK = 0.9  # how much of the largest mean that a row can have for its variance it gets at most
LARGEST = 4.0  # factor by which measuring may change the size of a row
RECTIFIED = 1 / (torch.pi - 1)  # mean² / variance of a rectified normal variable
STILL = 1e-26  # below this fraction of mean², a variance is rounding
TINY = 1e-300
BLOCK = 2**18  # entries of a weight that are computed at once: there are a dozen temporaries of their size


def balance(model: ModelEditor, units: Units, signs: Mapping[str, Tensor], density: float) -> None:
    """Give weights the signs of their units, and magnitudes with which the network starts as it would without signs.

    First every row gets what (*) says for inputs that are alike in distribution. Then the network is run, in
    evaluation mode, on normal inputs: from the first weight to the last, the net input of each row is measured, and (*)
    is solved again for what arrives. What is left of the mean moves into the bias. Recurrent weights keep the spectral
    radius and the spread of singular values that they had (`balanced_recurrent`).

    Args:
        model: the model; the stored weights and biases change.
        units: its units.
        signs: signs of the presynaptic units, +1, −1 or 0 where free, by the weight's name.
        density: fraction of each row's synapses that do not start at 0.
    """
    bio = copied(model.bio, torch.float64)  # deep networks tell samples apart in the eighth digit
    found = find_weights(bio).sites
    sites = {name: found[name] for name in signs}
    signs = {name: sign.to(sites[name].raw.device) for name, sign in signs.items()}
    blocks = {name: _blocks(site, units.readings[name]) for name, site in sites.items()}
    biases = {name: bias for name, site in sites.items() if (bias := _bias(model, site)) is not None}
    targets: dict[str, tuple[Tensor, Tensor]] = {}

    def original(name: str) -> Tensor:
        return _connections(model.sites[name]).double()

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
    runs = _Runs(model, bio, measured, changing)
    runs.show(measure)
    for name, site in sites.items():
        generator = model.generator(name)
        if (block := blocks[name]) is not None:
            _store(site, _balanced_blocks(site, original(name), signs[name], block, density, generator))
            model.edits[name].remark(_spectra(site, original(name), block))
            continue
        sign = site.incoming(site.spread_presynaptic(signs[name]).expand(site.shape))
        rows = balanced(site.incoming(original(name)), sign, density, generator)
        _store(site, site.from_incoming(rows))
    runs.show(refit)
    for name, site in sites.items():
        model.edits[name].replace_raw(site.raw.to(model.sites[name].raw))
        if name in biases and biases[name] not in model.excluded:
            model.value(biases[name]).copy_(attribute(bio, biases[name]))


def _blocks(site: WeightSite, reading: Reading) -> list[Tensor] | None:
    """The rows of a recurrent matrix; a recurrent convolution, with many synapses for each pair of units, has none."""
    is_matrix = site.shape.numel() == site.units * site.presynaptic_units
    return recurrent_blocks(reading) if is_matrix else None


def recurrent_blocks(reading: Reading) -> list[Tensor] | None:
    """The rows of a recurrent weight that feed the units that it reads, in their order; several if units have gates.

    None if a row feeds no unit that the weight reads.
    """
    returns = reading.returns
    count = len(reading.numbers)
    if not count or len(returns) % count or bool((returns < 0).any()):
        return None
    blocks = returns.view(-1, count)
    if not all(torch.equal(block.sort().values, torch.arange(count)) for block in blocks):
        return None
    return [index * count + block.argsort() for index, block in enumerate(blocks)]


def _balanced_blocks(
    site: WeightSite, weight: Tensor, sign: Tensor, blocks: list[Tensor], density: float, generator: torch.Generator
) -> Tensor:
    rows = site.incoming(weight).clone()
    for block in blocks:
        block = block.to(rows.device)
        rows[block] = balanced_recurrent(rows[block], sign.to(rows), density, generator)
    return site.from_incoming(rows)


def _spectra(site: WeightSite, free: Tensor, blocks: list[Tensor]) -> str:
    """What became of the spectrum of recurrent weights, in words; of each gate, if there are several."""
    before, after = site.incoming(free), site.incoming(_connections(site))
    measures = {"spectral radius": spectral_radius, "entropy of singular values": singular_entropy}
    numbers = {
        name: [", ".join(f"{measure(rows[block.to(rows.device)]):.3g}" for block in blocks) for rows in (before, after)]
        for name, measure in measures.items()
    }
    return "; ".join(f"{name} {old} → {new}" for name, (old, new) in numbers.items())


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
    rows = max(1, BLOCK // max(1, weight.shape[1]))
    blocks = zip(weight.split(rows), sign.split(rows), strict=True)
    return torch.cat([_balanced(*block, density, generator) for block in blocks])


def _balanced(weight: Tensor, sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
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


def _refit(
    site: WeightSite, net_input: NetInput, signs: Tensor, mean: Tensor, variance: Tensor, bias: Tensor | None
) -> None:
    """Solve (*) for the net input that is measured."""
    weight = _connections(site)
    sign = site.spread_presynaptic(signs).expand(site.shape)
    x, y = net_input(weight * (sign > 0)), net_input(-weight * (sign < 0))
    mx, my = x.mean(0, keepdim=True), y.mean(0, keepdim=True)
    x, y = x.sub_(mx), y.sub_(my)
    xx, yy, xy = ((u * v).mean((0, 2)) for u, v in ((x, x), (y, y), (x, y)))
    del x, y
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
    if bias is not None:
        bias.add_(mean - gain * (a * mx - b * my))


NetInput = Callable[[Tensor], Tensor]
"""Net input of the postsynaptic units through a weight, without their bias, shape (samples, units, positions)."""


class _Runs:
    """Runs of a copy of the network on normal inputs, in which the first use of each weight is looked at."""

    def __init__(
        self, model: ModelEditor, bio: fx.GraphModule, sites: Mapping[str, WeightSite], changing: list[nn.Parameter]
    ) -> None:
        assert model.understood is not None
        self._bio = bio
        self._sites = sites
        self._changing = changing
        self._batch = _Batch(0, 0, model.understood.run)
        self._recording: Recording | None = None
        most = len(model.understood.recording.operations) * MORE + MARGIN
        for batch in _batches(model.understood, model.generator("inputs")):
            with contextlib.suppress(Exception):  # a model may take no other inputs than those of its example
                self._recording = self._recorded(Recorder(most), batch.run)
                self._batch = batch
                break
        if self._recording is None:
            return
        self._forms = Forms(self._recording, lambda value: True)
        self._first: dict[str, Read] = {}
        for read in self._forms.reads:
            site = self._sites.get(read.parameter.name)
            if site is not None and _tells(site, read):
                self._first.setdefault(site.name, read)

    def show(self, see: Callable[[WeightSite, NetInput], None]) -> None:
        """Run once, and show what arrives at the first use of each weight; what is stored then is read there."""
        if self._recording is None:
            return

        def look(moment: Moment) -> Tensor | None:
            site = self._sites[moment.read.parameter.name]
            if len(moment.source) < FEWEST:
                return None
            see(site, lambda weight: self._by_sample(moment, moment.net_input(_as_read(site, moment.read, weight))))
            return _as_read(site, moment.read, site.effective())

        replay = Replay(self._recording, self._forms, dict.fromkeys(self._first.values(), look))
        self._recorded(replay, self._batch.run)

    def _recorded(self, recorder: Recorder, run: Run) -> Recording:
        generator = torch.random.get_rng_state()
        recording = recording_of(recorder, self._bio, but=self._changing)
        with recording, as_recorded_graph(self._bio, recorder), _in_double(self._bio):
            torch.manual_seed(0)
            run(self._bio)
        assert torch.equal(generator, torch.random.get_rng_state())
        return recorder.recording

    def _by_sample(self, moment: Moment, net: Tensor) -> Tensor:
        """Net input with its axes in order. Where positions lie behind samples on one axis, they become one."""
        axes = [axis % net.dim() for axis in moment.read.output_axes]
        net = net.movedim(axes, list(range(1, 1 + len(axes)))) if axes else net[:, None]
        net = net.flatten(1, max(1, len(axes))).unsqueeze(-1).flatten(2)
        samples, axis = self._batch.samples, self._batch.axis
        positions = len(net) // max(1, samples)
        if samples and positions > 1 and len(net) == samples * positions and net.shape[2] == 1:
            net = net.view((positions, samples, -1) if axis else (samples, positions, -1)).transpose(1, 2)
        return net.transpose(0, 2) if axis and net.shape[2] == samples else net


def _tells(site: WeightSite, read: Read) -> bool:
    """Whether a use of a weight shows the net input of all its units, for activity that samples tell apart."""
    if read.source is None or read.source.depends is not Depends.INPUTS or read.others:
        return False
    units = math.prod(n for n, role in zip(read.lengths, read.roles, strict=True) if role[1])
    has_samples = all(axis % len(read.source.shape) > 0 for axis in read.source_axes)
    return units == site.units and has_samples and len(read.source.shape) > 1


def _as_read(site: WeightSite, read: Read, weight: Tensor) -> Tensor:
    """A weight in the shape in which the graph has it: if synapses have an activation each, next to each other."""
    return weight if weight.shape == read.parameter.shape else site.effective()


class _Batch(NamedTuple):
    """A way to run the model.

    Attributes:
        samples: the number of samples; 0 if the axis on which they are is not known.
        axis: that axis of the inputs: 0, or 1 behind time.
        run: runs it.
    """

    samples: int
    axis: int
    run: Run


def _batches(understood: Understanding, generator: torch.Generator) -> Iterator[_Batch]:
    """Ways to run the model: on many normal samples, or on normal inputs like those of the example."""
    args, kwargs = understood.recording.first_call or ((), {})
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    for axis in (0, 1) if understood.is_one_call else ():
        lengths = {x.shape[axis] if x.dim() > axis else 0 for x in leaves}
        if len(lengths) == 1 and lengths.pop() > 0:
            samples = max(_samples(x.shape, axis) for x in leaves)
            yield _Batch(samples, axis, _normal(understood, generator, samples, axis))
    if understood.is_one_call:
        yield _Batch(0, 0, _normal(understood, generator, None))
    yield _Batch(0, 0, understood.run)


def _normal(understood: Understanding, generator: torch.Generator, samples: int | None, axis: int = 0) -> Run:
    """Runs a model on standard normal numbers in place of those of the example, and on integers that occur there."""

    def like(given: Tensor) -> Tensor:
        sizes = (samples if samples is not None and i == axis else n for i, n in enumerate(given.shape))
        shape = torch.Size(sizes)
        if given.is_floating_point() and given.dim() > 1:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(given.device)
        if samples is None or given.is_floating_point() or not given.numel():
            return given
        values = given.flatten().cpu()
        if len(values.unique()) <= 2:  # a mask stays one
            return given.index_select(axis, torch.arange(samples, device=given.device) % given.shape[axis])
        chosen = torch.randint(len(values), shape, generator=generator)
        return values[chosen].to(given.device)

    args, kwargs = pytree.tree_map_only(Tensor, like, understood.recording.first_call or ((), {}))
    return call(args, kwargs)


@contextlib.contextmanager
def _in_double(bio: nn.Module) -> Iterator[None]:
    """Give a model of doubles the numbers that it is given as doubles."""

    def cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))

    handle = bio.register_forward_pre_hook(cast, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _samples(shape: torch.Size, axis: int) -> int:
    """Number of samples that tell enough, for inputs whose axes are samples, units and space, or time and samples."""
    positions = shape[0] if axis else shape[2:].numel()
    return max(FEWEST, min(SAMPLES, POSITIONS // max(1, positions)))


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


def _bias(model: ModelEditor, site: WeightSite) -> str | None:
    """Name of the bias of the postsynaptic units, if it is theirs alone."""
    assert model.understood is not None
    forms = model.understood.forms
    names = {forms.biases.get(read.operation) for read in forms.reads if read.parameter.name == site.name}
    others = {forms.biases.get(read.operation) for read in forms.reads if read.parameter.name != site.name}
    name = names.pop() if len(names) == 1 else None
    if name is None or name in others or model.understood.forms.users.get(name):
        return None
    return name if attribute(site.bio, name).shape == (site.units,) else None
