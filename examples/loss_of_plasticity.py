"""Loss of plasticity: does turnover of synapses, or of units, keep a network able to learn?

Run it with `python examples/loss_of_plasticity.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biofx import passes
from biofx.base import noise
from biofx.passes.continual_backprop import bounds_of, fresh, judged
from biofx.passes.rejuvenate import RULES, turn_over_

PLAIN, EXPONENTIAL, THRESHOLD = "plain", "Rejuvenate, exponential", "Rejuvenate, threshold"
CONTINUAL, LINEAR = "ContinualBackprop", "linear"

INPUTS, FLIPPING, HIDDEN = 20, 15, 5  # as in the paper
TARGET_UNITS, BETA = 100, 0.7
EVERY = 10_000  # examples from one flip to the next, and in a bin of the results


@dataclass(frozen=True)
class Setting:
    """How a network learns.

    Attributes:
        step_size: of gradient descent on the squared error.
        rule: what acts at every step, if anything does.
        linear: whether the network has no hidden units.
    """

    step_size: float
    rule: passes.Pass | None = None
    linear: bool = False


def problem(seeds: Sequence[int], bins: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples of every bin: inputs (examples, seeds, bits), of which the last is 1, and targets (examples, seeds).

    15 bits keep their values in a bin; between bins, one of them flips. The others are random. The target is a network
    of linear threshold units with weights ±1, one for each seed.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def bits(*shape: int) -> Tensor:
        return torch.stack([torch.randint(2, shape, generator=g).float() for g in generators], -1)

    incoming, outgoing = 2 * bits(TARGET_UNITS, INPUTS + 1) - 1, 2 * bits(TARGET_UNITS + 1) - 1
    thresholds = (INPUTS + 1) * BETA - (incoming < 0).sum(1)
    slow = bits(FLIPPING)
    for _ in range(bins):
        inputs = torch.cat(
            [slow.expand(EVERY, -1, -1), bits(EVERY, INPUTS - FLIPPING), torch.ones(EVERY, 1, len(seeds))], 1
        )
        active = torch.einsum("tis,uis->tus", inputs, incoming) > thresholds
        targets = torch.einsum("tus,us->ts", active.float(), outgoing[:-1]) + outgoing[-1]
        yield inputs.transpose(1, 2).contiguous(), targets
        for index, generator in enumerate(generators):
            which = int(torch.randint(FLIPPING, (), generator=generator))
            slow[which, index] = 1 - slow[which, index]


def network(seed: int) -> nn.Sequential:
    """The network that learns, with the paper's initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        nn.init.kaiming_uniform_(model[0].weight, nonlinearity="relu")
        nn.init.kaiming_uniform_(model[2].weight, nonlinearity="linear")
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    return model


class Networks:
    """Networks that learn side by side, one for each setting and seed: what `network` does with rules attached.

    One step of each network for itself would take weeks. Gradients are written out, and rules are the functions of
    which the passes are made, with the same random numbers; `tests/test_loss_of_plasticity.py` compares the two.

    Attributes:
        incoming: weights and bias of the hidden units, shape (settings, seeds, units, inputs + 1).
        outgoing: weights and bias of the output, shape (settings, seeds, units + 1).
    """

    def __init__(self, settings: Sequence[Setting], seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.settings, self.seeds = settings, seeds
        layers = [[(m.weight.detach(), m.bias.detach()) for m in (net[0], net[2])] for net in map(network, seeds)]
        incoming, outgoing = (
            torch.stack([torch.cat([w, b[:, None]], 1) for w, b in own]).to(dtype) for own in zip(*layers, strict=True)
        )
        self.incoming = incoming.repeat(len(settings), 1, 1, 1)
        self.outgoing = outgoing[:, 0].repeat(len(settings), 1, 1)
        self._steps = 0
        self._rates = torch.tensor([2 * each.step_size for each in settings], dtype=dtype)[:, None]
        self._hidden = torch.ones(len(settings), len(seeds), HIDDEN + 1, dtype=dtype)
        self._turning = [i for i, each in enumerate(settings) if isinstance(each.rule, passes.Rejuvenate)]
        self._renewing = [i for i, each in enumerate(settings) if isinstance(each.rule, passes.ContinualBackprop)]
        own = [settings[i].rule for i in self._renewing]
        self._rate = torch.tensor([rule.replacement_rate for rule in own], dtype=dtype)[:, None]
        shape = len(own), len(seeds), HIDDEN
        self._state = (
            torch.zeros(shape, dtype=dtype),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape[:2], dtype=dtype),
        )
        self._bounds = [bounds_of(w[:, :INPUTS]) for w in incoming]

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Learn one example for each seed; returns the errors before, shape (settings, seeds)."""
        self._steps += 1
        hidden = self._hidden[..., :HIDDEN]
        torch.clamp(torch.matmul(self.incoming, inputs[..., None])[..., 0], min=0, out=hidden)
        error = torch.linalg.vecdot(self.outgoing, self._hidden) - targets
        slope = (self._rates * error)[..., None]
        back = slope * self.outgoing[..., :HIDDEN] * (hidden > 0)
        self.outgoing.addcmul_(slope, self._hidden, value=-1)
        self.incoming.addcmul_(back[..., None], inputs[:, None], value=-1)
        for index in self._turning:
            if self._steps % self.settings[index].rule.every == 0:
                self._turn_over(index, self.settings[index].rule)
        if self._renewing:
            self._renew(hidden[self._renewing])
        return error

    def _counter(self, seed: int, *purpose: str) -> noise.Counter:
        return noise.Counter(torch.tensor(seed), torch.tensor(self._steps), purpose)

    def _turn_over(self, index: int, options: passes.Rejuvenate) -> None:
        """What `Rejuvenate` does."""
        rule = RULES[options.rule]
        weights = [("0.weight", w[:, :INPUTS]) for w in self.incoming[index]]
        weights += [("2.weight", w[None, :HIDDEN]) for w in self.outgoing[index]]
        values = [w for _, w in weights]
        numbers = rule.numbers([*rule.statistics(values)], [w.numel() for w in values], options.dre)
        which, new = (
            [
                self._counter(seed, options.name, name, purpose)
                for (name, _), seed in zip(weights, [*self.seeds, *self.seeds], strict=True)
            ]
            for purpose in ("which", "new")
        )
        turn_over_(rule, noise.pairs(values, which), noise.normal(values, new), values, values, *numbers)

    def _renew(self, hidden: Tensor) -> None:
        """What `ContinualBackprop` does."""
        options = self.settings[self._renewing[0]].rule
        contribution = hidden * self.outgoing[self._renewing, :, :HIDDEN].abs()
        *state, masks = judged(
            *self._state, contribution, rate=self._rate, maturity=options.maturity, decay=options.decay
        )
        self._state = tuple(state)
        if not masks.any():
            return
        for index, seed, unit in masks.nonzero().tolist():
            weight = self.incoming[self._renewing[index], seed]
            (uniform,) = noise.uniform(
                [weight[:, :INPUTS]], [self._counter(self.seeds[seed], options.name, "0.weight", "fresh")]
            )
            weight[unit, :INPUTS] = fresh(uniform, None, self._bounds[seed])[unit]
            weight[unit, INPUTS] = 0
            self.outgoing[self._renewing[index], seed, unit] = 0
