"""Net inputs: what postsynaptic units receive through each weight when a network runs on normal inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from biofx.analysis.forms import Forms
from biofx.analysis.graphs import as_recorded
from biofx.analysis.replay import PendingRead, Replay
from biofx.analysis.understanding import Run, Understanding, call
from biofx.base.torch_internals import pytree
from biofx.recording.operations import Depends, Recording, depends_of
from biofx.recording.recorder import Recorder, recording_of

if TYPE_CHECKING:
    from biofx.analysis.reads import WeightRead
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.model_editor import ModelEditor

MAX_SAMPLES = 256  # in the batch on which net inputs are measured
MAX_POSITIONS = 4096  # in time and space, of all samples together; positions count as samples do
MIN_SAMPLES = 32  # whatever their number of positions
BLOCK = 2**18  # numbers that are multiplied at once in single precision
# If a larger batch takes more operators than this, the axis that grew was not that of samples, but one that forward
# loops over.
OPERATOR_FACTOR, OPERATOR_MARGIN = 2, 100

NetInput = Callable[[Tensor], Tensor]
"""Maps a weight to the net input of its postsynaptic units without bias, shape (samples, units, positions)."""


class NetInputRuns:
    """Runs of a network on normal inputs, always the same ones, that show the net inputs of its weights.

    The first run finds a batch that the network accepts and the first use of each weight; later ones replay it.

    Args:
        model: the original network, with the way to run it.
        bio: the copy that is run, in float64 except for parameters that its graph reads.
        sites: the weights to show.
        changing: parameters of the copy that visitors change; all others are restored after each run.
    """

    def __init__(
        self, model: ModelEditor, bio: fx.GraphModule, sites: Mapping[str, WeightSite], changing: list[nn.Parameter]
    ) -> None:
        assert model.understood is not None
        self._bio = bio
        self._sites = sites
        self._changing = changing
        self._batch = _Batch(0, 0, model.understood.run)
        self._recording: Recording | None = None
        most = len(model.understood.recording.operations) * OPERATOR_FACTOR + OPERATOR_MARGIN
        for batch in _batches(model.understood, model.generator("inputs")):
            with contextlib.suppress(Exception):  # a model may reject inputs of another batch size
                self._recording = self._recorded(_BySample(batch, most), batch.run)
                self._batch = batch
                break
        if self._recording is None:
            return
        self._forms = Forms(self._recording, lambda value: True)
        self._first: dict[str, WeightRead] = {}
        for read in self._forms.reads:
            site = self._sites.get(read.parameter.name)
            if site is not None and _shows_net_input(site, read):
                self._first.setdefault(site.name, read)

    def visit(self, visitor: Callable[[WeightSite, NetInput], None]) -> None:
        """Run once and call the visitor at the first use of each weight, in order; a weight that it stores is used."""
        if self._recording is None:
            return

        def look(pending: PendingRead) -> Tensor | None:
            site = self._sites[pending.read.parameter.name]
            if len(pending.source) < MIN_SAMPLES:
                return None
            visitor(site, lambda w: self._by_sample(pending, pending.net_input(_as_read(site, pending.read, w))))
            return _as_read(site, pending.read, site.effective())

        replay = _Replay(self._batch, self._recording, self._forms, dict.fromkeys(self._first.values(), look))
        self._recorded(replay, self._batch.run)

    def _recorded(self, recorder: Recorder, run: Run) -> Recording:
        with (
            recording_of(recorder, self._bio, but=self._changing),
            as_recorded(self._bio, recorder, torch.float64, by_node=True),
            self._bio.register_forward_pre_hook(_in_double, with_kwargs=True, prepend=True),
        ):
            run(self._bio)
        return recorder.recording

    def _by_sample(self, pending: PendingRead, net: Tensor) -> Tensor:
        """Net input as (samples, units, positions), also if samples and positions share an axis of the operator."""
        axes = [axis % net.dim() for axis in pending.read.output_axes]
        net = net.movedim(axes, list(range(1, 1 + len(axes)))) if axes else net[:, None]
        net = net.flatten(1, max(1, len(axes))).unsqueeze(-1).flatten(2)
        samples, axis = self._batch.samples, self._batch.axis
        positions = len(net) // max(1, samples)
        if samples and positions > 1 and len(net) == samples * positions and net.shape[2] == 1:
            net = net.view((positions, samples, -1) if axis else (samples, positions, -1)).transpose(1, 2)
        return net.transpose(0, 2) if axis and net.shape[2] == samples else net


def _shows_net_input(site: WeightSite, read: WeightRead) -> bool:
    """Whether a use of a weight computes the net input of all its units for each sample."""
    if read.source is None or read.source.depends is not Depends.INPUTS or read.others:
        return False
    units = math.prod(n for n, role in zip(read.lengths, read.roles, strict=True) if role[1])
    has_samples = all(axis % len(read.source.shape) > 0 for axis in read.source_axes)
    return units == site.units and has_samples and len(read.source.shape) > 1


def _as_read(site: WeightSite, read: WeightRead, weight: Tensor) -> Tensor:
    """A weight in the shape that the operator reads; the effective weight if each synapse has an activation."""
    weight = weight if weight.shape == read.parameter.shape else site.effective()
    return weight if read.operation.operator in _PRODUCTS else weight.double()


class _Batch(NamedTuple):
    """A way to run the model.

    Attributes:
        samples: the number of samples; 0 if their axis is unknown.
        axis: the axis of samples in the inputs: 0, or 1 if time comes first.
        run: runs the model.
    """

    samples: int
    axis: int
    run: Run

    @property
    def axes(self) -> tuple[int, int]:
        """The lengths of an axis that samples share with positions, as two axes."""
        return (-1, self.samples) if self.axis else (self.samples, -1)


class _BySample(Recorder):
    """Multiplies activity by weights in single precision, and loses no digit in which samples differ.

    A product is linear: it is that of the mean over samples, in double, plus those of the deviations from the mean,
    whose digits are all about differences. In double alone, PyTorch's convolution takes five times as long, and lays
    out the columns of a whole batch.

    Args:
        batch: how the model runs.
        *args: arguments of the recorder.
    """

    def __init__(self, batch: _Batch, *args: Any) -> None:
        super().__init__(*args)
        self._batch = batch

    def execute(self, func: Any, args: Any, kwargs: Any, values: Any) -> Any:
        """Run an operator."""
        at = _PRODUCTS.get(func)
        if at is None:
            return func(*args, **kwargs)
        source, weight, rest = args[at], args[at + 1], args[at + 2 :]
        is_by_sample = depends_of(values[at]) is Depends.INPUTS is not depends_of(values[at + 1])
        if kwargs or not is_by_sample or source.dtype is not torch.float64 or not self._has_samples(source):
            return func(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args), **kwargs)
        axis, source = self._batch.axis, source.unflatten(0, self._batch.axes)
        mean = source.mean(axis, keepdim=True)
        common = func(*args[:at], mean.flatten(0, 1), weight.double(), *rest)
        result = common.new_empty(source.shape[:2].numel(), *common.shape[1:])
        common, by_sample = common.unflatten(0, mean.shape[:2]), result.unflatten(0, self._batch.axes)
        multiply, weight = _without_bias(func, rest), weight.float()
        count = max(1, BLOCK // mean.numel())
        for part, own in zip(by_sample.split(count, axis), source.split(count, axis), strict=True):
            part.copy_(multiply((own - mean).float().flatten(0, 1), weight).view(part.shape)).add_(common)
        return result

    def _has_samples(self, source: Tensor) -> bool:
        samples = self._batch.samples
        return samples > 1 and source.numel() > 0 and len(source) % samples == 0


_PRODUCTS = {torch.ops.aten.convolution.default: 0, torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
"""The position of the first factor of products; the second follows, and the bias is what else is a tensor."""


def _without_bias(product: Any, rest: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """A product without its bias, given what follows the factors."""
    if product is not torch.ops.aten.convolution.default:
        return torch.mm
    return lambda source, weight: product(source, weight, None, *rest[1:])


class _Replay(_BySample, Replay):
    """Runs the model again."""


def _batches(understood: Understanding, generator: torch.Generator) -> Iterator[_Batch]:
    """Ways to run the model, best first: many normal samples, normal inputs of the example's shapes, the example."""
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
    """Runs a model on standard normal numbers for floating-point inputs, and on values of the example for integers."""

    def like(given: Tensor) -> Tensor:
        sizes = (samples if samples is not None and i == axis else n for i, n in enumerate(given.shape))
        shape = torch.Size(sizes)
        if given.is_floating_point() and given.dim() > 1:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(given.device)
        if samples is None or given.is_floating_point() or not given.numel():
            return given
        values = given.flatten().cpu()
        if len(values.unique()) <= 2:  # a mask keeps its pattern
            return given.index_select(axis, torch.arange(samples, device=given.device) % given.shape[axis])
        chosen = torch.randint(len(values), shape, generator=generator)
        return values[chosen].to(given.device)

    args, kwargs = pytree.tree_map_only(Tensor, like, understood.recording.first_call or ((), {}))
    return call(args, kwargs)


def _in_double(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Cast floating-point inputs, for a model in float64."""
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))


def _samples(shape: torch.Size, axis: int) -> int:
    """Number of samples to measure with, for inputs of shape (samples, units, *space) or (time, samples, …)."""
    positions = shape[0] if axis else shape[2:].numel()
    return max(MIN_SAMPLES, min(MAX_SAMPLES, MAX_POSITIONS // max(1, positions)))
