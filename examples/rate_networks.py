"""Rate networks that decide what they see: two tasks, a recurrent network written by hand, and its training.

Each of 40 time steps shows no more than noisy evidence:

- "perceptual": which of two inputs is the larger one? Coherence says by how much, from 3.2% to 51.2%.
- "context": two such pairs at once, motion and colour, and a cue that says which of them counts (Mante et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import passes

UNITS = 100
GAIN = 1.5  # spectral radius of the free recurrent weight at the start, as in Song et al. 2016
LEAK = 0.2  # per time step: with steps of 20 ms, a time constant of 100 ms
UNIT_NOISE = 0.1  # standard deviation of what is added to the net input of a unit, at each time step
TIME_STEPS = 40
COHERENCES = (0.032, 0.064, 0.128, 0.256, 0.512)
EVIDENCE_NOISE = 0.17  # standard deviation of an input, at each time step
TASKS = {"perceptual": 1, "context": 2}  # the number of modalities

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
GRADIENT_NORM = 1.0  # clipped, as networks of many time steps need
TEST_SEED = 1_000_000  # no network is trained on it
CRITERION = 0.85
WINDOW = 10  # batches; every trial is new, so accuracy in training is accuracy on new trials


class RateNetwork(nn.Module):
    """Rate units with a leak and noise, which read the stimulus and each other; and a readout of two choices."""

    def __init__(self, channels: int, units: int = UNITS) -> None:
        super().__init__()
        self.input = nn.Linear(channels, units)
        self.recurrent = nn.Linear(units, units)
        self.readout = nn.Linear(units, 2)
        nn.init.normal_(self.recurrent.weight, std=GAIN / math.sqrt(units))

    def forward(self, stimuli: Tensor) -> Tensor:
        """Map stimuli (batch, time, channels) to the logits of the two choices (batch, 2), after the last time step."""
        rates = stimuli.new_zeros(len(stimuli), self.recurrent.out_features)
        for stimulus in stimuli.unbind(1):
            net_input = self.input(stimulus) + self.recurrent(rates) + UNIT_NOISE * torch.randn_like(rates)
            rates = (1 - LEAK) * rates + LEAK * F.relu(net_input)
        return self.readout(rates)


@dataclass(frozen=True)
class Trials:
    """What a network sees, and what it should choose.

    Attributes:
        stimuli: shape (trials, time, channels); two channels for each modality, then the cue if there are two.
        coherences: signed, of the modality that counts; and, in the task "context", of the other one.
    """

    stimuli: Tensor
    coherences: tuple[Tensor, ...]

    @property
    def answers(self) -> Tensor:
        """The right choice: 1 where the second channel of the modality that counts is the larger one, or 0."""
        return (self.coherences[0] > 0).long()


def draw(task: str, count: int, generator: torch.Generator) -> Trials:
    """New trials: the means of the channels of a modality differ by its coherence."""
    modalities = TASKS[task]
    strengths = torch.tensor(COHERENCES)[torch.randint(len(COHERENCES), (count, modalities), generator=generator)]
    coherences = strengths * (2 * torch.randint(2, (count, modalities), generator=generator) - 1)
    means = torch.stack([(1 - coherences) / 2, (1 + coherences) / 2], dim=2).flatten(1)
    noise = torch.randn(count, TIME_STEPS, 2 * modalities, generator=generator)
    stimuli = means[:, None] + EVIDENCE_NOISE * noise
    if modalities == 1:
        return Trials(stimuli, (coherences[:, 0],))
    cued = torch.randint(2, (count,), generator=generator)
    cues = F.one_hot(cued, 2).float()[:, None].expand(-1, TIME_STEPS, -1)
    counts, other = (coherences.gather(1, index[:, None])[:, 0] for index in (cued, 1 - cued))
    return Trials(torch.cat([stimuli, cues], dim=2), (counts, other))


def ideal(coherences: Tensor) -> Tensor:
    """How often someone chooses 1 who adds up all the evidence: the difference of two inputs, over all time steps."""
    return torch.special.ndtr(coherences * math.sqrt(TIME_STEPS / 2) / EVIDENCE_NOISE)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        before: the network before training, a plain one.
        after: the network after training, a plain one.
        learning: accuracy on each batch, before the network learns from it.
        choices: what it chooses in the test trials.
        accuracy: how often that is right.
    """

    before: RateNetwork
    after: RateNetwork
    learning: Tensor
    choices: Tensor
    accuracy: float

    def curve(self) -> tuple[Tensor, Tensor]:
        """Numbers of trials so far, and for each the accuracy in the last `WINDOW` batches of them."""
        window = min(WINDOW, len(self.learning))
        accuracies = self.learning.unfold(0, window, 1).mean(1)
        return (torch.arange(len(accuracies)) + window) * BATCH_SIZE, accuracies

    def trials_to_criterion(self) -> float:
        """Number of trials after which the criterion is reached, infinite if it never is."""
        trials, accuracies = self.curve()
        reached = trials[accuracies >= CRITERION]
        return float(reached[0]) if len(reached) else math.inf


def train(
    task: str,
    pipeline: Sequence[passes.Pass],
    seed: int,
    batches: int,
    test: Trials,
    *,
    units: int = UNITS,
    learning_rate: float = LEARNING_RATE,
    after_batch: Callable[[], object] = lambda: None,
) -> Run:
    """Train a network from the weights, and on the trials, that belong to the seed.

    Args:
        task: its name.
        pipeline: the passes that transform the network; none leave it free.
        seed: of weights, noise and trials.
        batches: of `BATCH_SIZE` trials.
        test: the trials on which the trained network is tested.
        units: the number of units.
        learning_rate: the peak of the schedule.
        after_batch: called after each batch.
    """
    torch.manual_seed(seed)
    trials = torch.Generator().manual_seed(seed)
    model: nn.Module = RateNetwork(test.stimuli.shape[2], units)
    if pipeline:
        model = biofx.transform(model, pipeline, example_inputs=test.stimuli[:BATCH_SIZE], seed=seed)
    before = plain(model)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    if pipeline:
        biofx.attach(model, optimizer)  # this is all: the loop below is that of the free network
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=batches, pct_start=0.1)
    learning = []
    for _ in range(batches):
        batch = draw(task, BATCH_SIZE, trials)
        logits = model(batch.stimuli)
        learning.append((logits.argmax(1) == batch.answers).float().mean())
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        after_batch()
    if pipeline:
        biofx.verify(model)
    after = plain(model)
    choices = choose(after, test)
    accuracy = (choices == test.answers).float().mean().item()
    return Run(before, after, torch.stack(learning), choices, accuracy)


def plain(model: nn.Module) -> RateNetwork:
    """What the network computes now, as one of the class above: whatever a pass did is in its weights."""
    folded = biofx.fold(model) if isinstance(model, torch.fx.GraphModule) else model
    assert isinstance(folded, RateNetwork)
    result = RateNetwork(folded.input.in_features, folded.input.out_features)
    result.load_state_dict(folded.state_dict(), strict=True)
    return result


@torch.no_grad()
def choose(network: RateNetwork, trials: Trials) -> Tensor:
    torch.manual_seed(TEST_SEED)  # the noise of the units
    return network(trials.stimuli).argmax(1)


def eigenvalues(network: RateNetwork) -> Tensor:
    return torch.linalg.eigvals(network.recurrent.weight.detach())
