"""History: how gains, synapses and weights change while an optimizer trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.analysis.sites import WeightSite, find_weights
from biofx.base.errors import ArgumentError, LifecycleError
from biofx.base.gains import CRYSTALLIZED
from biofx.base.shards import is_sharded
from biofx.base.tables import Cell, Report, ShownAsReport, Table, wrapped
from biofx.base.torch_internals import runs_step_hooks
from biofx.model.changes import transformed
from biofx.training.blocks import wide
from biofx.training.counting import is_captured
from biofx.training.wrappers import innermost, parameter_ids

SAMPLE = 1 << 13  # connections of which quantiles are taken: their levels have a standard error of at most 0.6 %
PART = 1 << 16  # values that are summed at once on a CPU
QUANTILES = {"weight_q05": 0.05, "weight_q25": 0.25, "weight_q50": 0.5, "weight_q75": 0.75, "weight_q95": 0.95}
COLUMNS = (
    "gain_mean",
    "gain_std",
    "gain_min",
    "gain_max",
    "crystallized",
    "learning_rate",
    "turnover",
    "excitation",
    "weight_mean",
    "weight_std",
    "weight_min",
    "weight_max",
    *QUANTILES,
)
HEADERS = ("weight", "learning rate", "gain", "crystallized", "turnover", "excitation")
LIMITS = {"weight": 24, "learning rate": 9, "gain": 13}  # widths in a table that is too wide
USUAL = {"gain": "1", "crystallized": "0%", "turnover": ""}


def record(bio: nn.Module, optimizer: Optimizer, *, every: int = 100, limit: int = 1000) -> History:
    r"""Record how every weight changes in training: gains, crystallization, turnover, excitation, distribution.

    Statistics are taken now, as step 0, and after every `every`-th step of the optimizer, when rules have acted and
    signs are projected, whether `biofx.attach` is called before, later, again, or not at all. No line of the training
    loop changes. Of each weight that the optimizer holds and an operator uses, with c the gain of a synapse
    (`WeightSite.factor`, as in `summary`) and w the effective weight of a connection:

    - `gain_mean`, `gain_std`, `gain_min`, `gain_max`: of c; 1 and 0 without gains.
    - `crystallized`: the share of synapses with c < ½.
    - `learning_rate`: the effective one, $\eta\,\overline{c}$, with η that of the weight's group in the optimizer, and
      in $\overline{c}$ the noise that the next step draws (`VolumeDependentLearningRates`). None without an `lr`.
    - `turnover`: replacements so far, divided by the number of synapses. None without `Rejuvenate`.
    - `excitation`: the balance of excitation and inhibition, $e = \sum \max(w, 0) \,/ \sum \lvert w \rvert$. It is ½ if
      they balance; the ratio E/I is e/(1 − e). None if all w are 0.
    - `weight_mean`, `weight_std`, `weight_min`, `weight_max`: of w.
    - `weight_q05`, `weight_q25`, `weight_q50`, `weight_q75`, `weight_q95`: quantiles of w, from 8,192 of its
      connections if there are more (a standard error of at most 0.6 % of the distribution).

    Standard deviations are those of the population: they divide by the number.

    *Cost.* Statistics stay on the device until they are asked for, and then all come in one transfer; a step waits for
    nothing. Steps that are not recorded cost microseconds. When `limit` steps are held, every second one is dropped and
    `every` doubles, so memory is bounded and the whole training stays in view.

    *Data parallelism.* Under `DistributedDataParallel`, ranks are equal, and each records the whole: record on one of
    them. Weights that `fully_shard` cut are refused.

    Args:
        bio: a model made by `biofx.transform`, bare or inside `torch.compile` or a data-parallel wrapper. To record a
            plain model, give it gains of 1: `passes.FuzzyLearningRates(distribution="baseline")`.
        optimizer: an optimizer that holds weights of `bio`, or a wrapper around one. Then the steps of the one inside
            are recorded, before the wrapper changes weights itself (Lookahead). A fused optimizer counts the steps that
            `GradScaler` lets it skip.
        every: steps from one record to the next, at least 1.
        limit: the largest number of records that are held, at least 2; one has about 70 bytes for each weight.

    Returns:
        The history, which grows while the optimizer makes steps. It is also a context manager that ends with `stop()`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`; the optimizer holds no weight of it, or runs no hooks;
            an option out of its range; or weights are sharded.
        LifecycleError: at a step that a CUDA graph captures, because its replays run no hooks; or at a step that is
            recorded, if a weight was replaced or removed.

    Example:
        >>> import biofx, torch
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), "fuzzy-learning-rates,rejuvenate{dre=4.0}")
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> with biofx.record(bio, optimizer, every=2) as history:
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         bio(torch.ones(1, 8)).sum().backward()
        ...         optimizer.step()
        >>> [(row["step"], row["weight"], row["gain_max"] > 1) for row in history.rows]
        [(0, 'weight', True), (2, 'weight', True), (4, 'weight', True)]
        >>> history.latest()["weight/turnover"] > 0
        True
    """
    if isinstance(bio, Optimizer):
        raise ArgumentError("record: the arguments are swapped; write record(bio, optimizer)")
    for option, value, least in (("every", every, 1), ("limit", limit, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"record: {option} must be an integer ≥ {least}, got {value!r}")
    optimizer = innermost(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"record: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = parameter_ids(optimizer)
    sites = {name: site for name, site in find_weights(transformed(bio)).sites.items() if id(site.raw) in own}
    if not runs_step_hooks(optimizer):
        raise ArgumentError(f"record: steps of {type(optimizer).__name__} run no hooks; record the optimizer inside")
    for name, site in sites.items():
        if is_sharded(site.raw):
            raise ArgumentError(f"record: {name} is sharded, and its statistics would be those of a part; use DDP")
    sites = {name: site for name, site in sites.items() if site.raw.numel()}
    if not sites:
        name = type(optimizer).__name__
        raise ArgumentError(f"record: {name} holds no weight of this model; build it from bio.parameters()")
    return History(sites, optimizer, every, limit)


@dataclass
class _Record:
    """Statistics after a step: shape (weights, columns), on a device until they are read."""

    step: int
    values: Tensor


class History(ShownAsReport):
    """How weights changed in training; `biofx.record` makes it, and as a string it is a table of start and end.

    Attributes:
        every: steps from one record to the next; it doubles whenever the limit is reached.
        steps: the number of steps that the optimizer has made since recording began.
    """

    def __init__(self, sites: Mapping[str, WeightSite], optimizer: Optimizer, every: int, limit: int) -> None:
        self.every = every
        self.steps = 0
        self._limit = limit
        self._sites = dict(sites)
        self._raw = {name: site.raw for name, site in sites.items()}
        self._optimizer = optimizer
        self._records: list[_Record] = []
        self._samples: dict[Any, Tensor | None] = {}
        self._levels: dict[Any, Tensor] = {}
        self._has_begun = False
        self._note()
        # As decorators these would import the compiler with biofx.
        self._before_step = torch.compiler.disable(self._before)
        self._after_step = torch.compiler.disable(self._after)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def stop(self) -> None:
        """End the recording; what was recorded stays. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(self._sites)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table as data: for each recorded step, a dict for each weight, with `step`, `weight` and the columns."""
        self._fetch()
        return [row for each in self._records for row in self._rows(each)]

    def latest(self) -> dict[str, float]:
        """The last record as one flat dict, such as `{"fc1.weight/gain_mean": 0.98}`, without what is None.

        So `wandb.log(history.latest())`, or `writer.add_scalar(name, value, step)` of TensorBoard for each of them.
        """
        last = self._records[-1]
        last.values = last.values.cpu()
        found: dict[str, float] = {}
        for row in self._rows(last):
            found |= {f"{row['weight']}/{key}": row[key] for key in COLUMNS if row[key] is not None}
        return found

    def to_dict(self) -> dict[str, Any]:
        """All that was recorded, as data: `rows`, `every`, `steps` and the names of the `weights`."""
        return {"rows": self.rows, "every": self.every, "steps": self.steps, "weights": list(self.weights)}

    def _report(self) -> Report:
        rows, count = self.rows, len(self._sites)
        first, last = rows[:count], rows[-count:]
        held_steps = f"{len(self._records)} records, every {self.every} steps" if len(self._records) > 1 else "1 record"
        title = f"steps {first[0]['step']} → {last[0]['step']}; {held_steps}; {self.steps} steps in all"
        table = Table(HEADERS, [_cells(a, b) for a, b in zip(first, last, strict=True)], LIMITS, USUAL)
        return Report([wrapped(title), table], rows, **{k: v for k, v in self.to_dict().items() if k != "rows"})

    def _rows(self, found: _Record) -> list[dict[str, Any]]:
        rows = []
        for name, values in zip(self._sites, found.values.tolist(), strict=True):
            row = dict(zip(COLUMNS, values, strict=True))
            row |= {key: None for key in ("turnover", "learning_rate") if math.isnan(row[key])}
            if row["weight_min"] == row["weight_max"] == 0:
                row["excitation"] = None
            rows.append({"step": found.step, "weight": name, **row})
        return rows

    def _fetch(self) -> None:
        """Bring all records to the host in one transfer."""
        waiting = [each for each in self._records if each.values.device.type != "cpu"]
        if waiting:
            for each, values in zip(waiting, torch.stack([each.values for each in waiting]).cpu(), strict=True):
                each.values = values

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_captured():
            raise LifecycleError("record: a replayed CUDA graph runs no hooks; stop() the recording before the capture")
        is_recorded = (self.steps + 1) % self.every == 0
        if is_recorded:
            self._check_unchanged()
        self._has_begun = True
        if is_recorded:
            # Behind the hooks of an optimizer that was attached since: these project the weights.
            self._hooks.pop().remove()
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _check_unchanged(self) -> None:
        """Refuse a step after which a weight would be recorded that the optimizer does not train."""
        for name, site in self._sites.items():
            if site.is_gone or site.raw is not self._raw[name]:
                raise LifecycleError(
                    f"record: {name} was {'removed' if site.is_gone else 'replaced'} since the recording began; stop() "
                    "it, build the optimizer again, and record again"
                )

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A step may run the hooks of a base class's step first; that of the class then ends without a beginning.
        if self._has_begun:
            self.steps += 1
        elif self._records[-1].step == self.steps:
            self._records.pop()
        self._has_begun = False
        if self.steps % self.every == 0:
            self._note()

    @torch.no_grad()
    def _note(self) -> None:
        """Take the statistics of all weights."""
        rows = [self._statistics(site) for site in self._sites.values()]
        self._records.append(_Record(self.steps, torch.stack([row.to(rows[0].device) for row in rows])))
        if len(self._records) > self._limit:
            self.every *= 2
            self._records = [each for each in self._records if each.step % self.every == 0]

    def _statistics(self, site: WeightSite) -> Tensor:
        """The columns of a weight."""
        weight, gain = wide(site.effective().detach()).flatten(), site.factor
        one, none = weight.new_ones(()), weight.new_full((), math.nan)
        gains, rate = [one, one - 1, one, one, one - 1], one
        if gain is not None:
            gain = wide(gain)
            (low,) = _sums(gain, lambda part: torch.count_nonzero(part < CRYSTALLIZED))
            gains, rate = [*_moments(gain), *torch.aminmax(gain), low / gain.numel()], gain.mean()
        if (noisy := site.noisy_factor) is not None:
            rate = wide(noisy).mean()
        replaced = site.state("replaced")
        turnover = none if replaced is None else replaced.to(weight) / site.raw.numel()
        group = next((g for g in self._optimizer.param_groups if any(p is site.raw for p in g["params"])), {})
        learning_rate = rate * group["lr"] if "lr" in group else none
        exciting, inhibiting = _sums(weight, lambda part: part.clamp(min=0), lambda part: part.clamp(max=0))
        excitation = exciting / (exciting - inhibiting)
        numbers = [*gains, learning_rate, turnover, excitation, *_moments(weight), *torch.aminmax(weight)]
        return torch.stack([*(x.to(weight) for x in numbers), *self._quantiles(weight)])

    def _quantiles(self, weight: Tensor) -> Sequence[Tensor]:
        size, kind = (weight.numel(), weight.device), (weight.device, weight.dtype)
        if size not in self._samples:
            self._samples[size] = places(*size)
        if kind not in self._levels:
            self._levels[kind] = weight.new_tensor(list(QUANTILES.values()))
        chosen = self._samples[size]
        sample = weight if chosen is None else weight[chosen]
        return torch.quantile(sample, self._levels[kind]).unbind()


def _sums(values: Tensor, *functions: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The sums of functions over all values; on a CPU part by part: fresh memory costs more than arithmetic."""
    parts = values.flatten().split(PART if values.device.type == "cpu" else max(values.numel(), 1))
    return [torch.stack([function(part).sum() for part in parts]).sum() for function in functions]


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation."""
    mean = values.mean()
    (squares,) = _sums(values, lambda part: torch.linalg.vector_norm(part - mean).square())
    return mean, (squares / values.numel()).sqrt()


def places(count: int, device: torch.device) -> Tensor | None:
    """The places of a sample of `count` places, one at random in each of as many equal parts; None if all are taken.

    Equal distances, or the multiples of an irrational number, leave out columns of matrices of some sizes.
    """
    if count <= SAMPLE:
        return None
    inside = torch.rand(SAMPLE, dtype=torch.float64, generator=torch.Generator().manual_seed(SAMPLE))
    return ((torch.arange(SAMPLE) + inside) * (count / SAMPLE)).long().clamp(max=count - 1).to(device)


def _cells(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[Cell]:
    """The cells of a weight, from its first and its last row."""

    def change(key: str, form: str) -> str:
        return " → ".join(dict.fromkeys(form.format(row[key]) for row in (first, last) if row[key] is not None))

    is_plain = all(row["gain_min"] == row["gain_max"] == 1 for row in (first, last))
    return [
        last["weight"],
        change("learning_rate", "{:.2g}"),
        "1" if is_plain else f"{change('gain_mean', '{:.2f}')} ± {last['gain_std']:.2f}",
        change("crystallized", "{:.0%}"),
        change("turnover", "{:.2f}"),
        change("excitation", "{:.0%}"),
    ]
