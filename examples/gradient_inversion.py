"""Does diverse plasticity hide what a client learned from? Digits reconstructed from gradients and from updates.

Run it with `python examples/gradient_inversion.py` (16 minutes on two CPU cores; `--quick` takes less than two;
`--help` lists the options). In federated learning a client sends what it learned from an image, not the image. Here
one digit is reconstructed from that by an attack that is standard (Geiping et al. 2020): the attacker knows the network
before the step and the label, and optimizes an image, from noise, whose gradient points where the one that was sent
points:

    minimize  1 − cos(what was sent, gradient of the image) + λ·total variation

with Adam on the signs of its gradient, and pixels kept in [0, 1]. Of two starts the attacker keeps the one whose
objective is lower, and λ is the one of three that works best for each condition, on other networks and images. The
network is a small convolutional one, at initialisation and after training. Four things may be sent:

- "gradient": `.grad`, of a model that is attached (`biofx.attach`);
- "gradient, unattached": `.grad` of a model whose gains act in the backward pass, as in the reference package;
- "update": the weights after a step of SGD less those before, after `biofx.fold`, to an attacker who ignores the
  mechanism;
- "update, known": the same, to an attacker who knows by what factor each connection learned, who subtracts what an L1
  penalty added, and who leaves out connections whose change no gain explains, as synapses were replaced.

Every mechanism is attacked alone, with its default options but for two: gains are wide (ν = 0.4, log-normal), and
continual backprop replaces a tenth of the units at once, as its default replaces none in one step. Crystallization and
homeostasis, which start out neutral, have seen 20 batches at a learning rate of 0. "hofmann2025" is the recipe without
`GroupUnits`, which changes the function. Mirrored units, Dale's principle and grouped units are networks of their own,
which are trained and attacked as such.

What comes out is compared with the image: mean squared error, peak signal-to-noise ratio (PSNR, in dB, for pixels
from 0 to 1; above 40 dB nobody sees a difference, so it counts as 40), and structural similarity (SSIM, Wang et al.
2004, uniform windows of 5 × 5 pixels). A value belongs to one network, and is the mean over its images; tests are
paired by network, against the gradient of the plain network, and corrected for their number (Holm).

What came out (5 networks × 4 images; `results/gradient_inversion.json`): the attack reads digits off the gradient of
the plain network almost perfectly, at initialisation (SSIM 1.00) and after training (1.00).

- `.grad` of an attached model is that of the plain one, so it gives as much away, whatever the rules. So does that of
  interneurons, and of mirrored units; that of Dale's principle and of grouped units is read as well (0.95 to 1.00).
- An update, or `.grad` of a model that is not attached, is harder for an attacker who ignores the mechanism. With gains
  (`FuzzyLearningRates`, also split; homeostasis; "cortex"), exponentiated gradients and crystallization, digits are
  still read (SSIM 0.76 to 1.00). Volume-dependent rates, which slow weights down and not biases, hide most of them
  (0.06 and 0.40), and so do replaced synapses or units, whose changes are larger than what was learned (`Rejuvenate`:
  0.41 and −0.04; `ContinualBackprop`: 0.80 and 0.47). Interneurons are in between (0.76 and 0.54). The penalty of L1
  outweighs the small gradients of a trained network in some images (0.47 ± 0.54), and is nothing before (1.00).
- An attacker who knows the mechanism and its state reads all of it again (0.98 to 1.00).

So this is an obstacle to a careless attacker, and no protection.

References:
    Geiping, Bauermeister, Dröge & Moeller, Inverting gradients: how easy is it to break privacy in federated learning?,
    NeurIPS 2020. Zhao, Mopuri & Bilen, iDLG: improved deep leakage from gradients, 2020: the label can be read off the
    gradient. Wang, Bovik, Sheikh & Simoncelli, Image quality assessment: from error visibility to structural
    similarity, IEEE Transactions on Image Processing 13, 2004.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import biofx
from command_line import headline
from evidence import Comparison, Estimate, Report, compare, in_processes, parse_arguments
from handwritten_digits import Digits, load

PLAIN = "plain"
GRADIENT, UNATTACHED, UPDATE, KNOWN = "gradient", "gradient, unattached", "update", "update, known"
FUZZY = "fuzzy-learning-rates{nu=0.4,distribution=lognormal}"
PAPER = "fuzzy-learning-rates{nu=0.09},rejuvenate{dre=14.0,rule=threshold}"
LAMBDA = 1e-4  # of `L1Regularization`
ALL_VIEWS = GRADIENT, UNATTACHED, UPDATE, KNOWN


@dataclass(frozen=True)
class Condition:
    """What is done to a network.

    Attributes:
        pipeline: the passes.
        views: what the client sends, where that can make a difference.
        steps: for how many steps, with a learning rate of 0, rules have been at work that start out neutral.
        penalty: λ of the penalty λ·Σ|w| on its weights.
        own_weights: whether the network has other weights than the plain one, or uses them otherwise.
    """

    pipeline: str
    views: tuple[str, ...]
    steps: int = 0
    penalty: float = 0.0
    own_weights: bool = False


CONDITIONS = {
    PLAIN: Condition("", (GRADIENT, UPDATE)),
    "fuzzy": Condition(FUZZY, ALL_VIEWS),
    "volume": Condition("volume-dependent-learning-rates", ALL_VIEWS),
    "crystallize": Condition("crystallize", ALL_VIEWS, steps=20),
    "scaling": Condition("synaptic-scaling", ALL_VIEWS, steps=20),
    "split": Condition(f"split-synapses{{synapses=4}},{FUZZY}", ALL_VIEWS),
    "L1": Condition(f"l1-regularization{{strength={LAMBDA}}}", (UPDATE, KNOWN), penalty=LAMBDA),
    "rejuvenate": Condition("rejuvenate", (UPDATE, KNOWN)),
    "continual": Condition("continual-backprop{replacement_rate=0.1,maturity=0}", (UPDATE, KNOWN)),
    "EG": Condition("exponentiated-gradient", (UPDATE, KNOWN)),
    "hofmann2025": Condition(PAPER, ALL_VIEWS),
    "cortex": Condition("cortex", ALL_VIEWS),
    "interneurons": Condition("inhibitory-interneurons", (GRADIENT, UPDATE)),
    "mirror units": Condition("mirror-units", (GRADIENT, UPDATE), own_weights=True),
    "Dale": Condition("dales-principle", (GRADIENT, UPDATE), own_weights=True),
    "group units": Condition("group-units", (GRADIENT, UPDATE), own_weights=True),
}
STATES = ("at initialisation", "after training")
IMAGES = 4  # for each network
EPOCHS = 5
LEARNING_RATE = 0.05  # of the client
TOTAL_VARIATIONS = (1e-4, 1e-3, 1e-2)  # λ, of which the attacker takes the best for each condition
VALIDATION_SEED, VALIDATION_SEEDS = 1_000, 2  # of other networks, with other images, for that choice
ITERATIONS, QUICK_ITERATIONS = 400, 40
STARTS = 2
LARGEST_GAIN = 2.0  # of `FuzzyLearningRates`
METRICS = ("MSE", "PSNR", "SSIM")
LARGEST_PSNR = 40.0

COLORS = {GRADIENT: "#56B4E9", UNATTACHED: "#E69F00", UPDATE: "#0072B2", KNOWN: "#D55E00"}

Gradients = dict[str, Tensor]


class ConvNet(nn.Module):
    """A small convolutional network for images of 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, kernel_size=3, padding=1, stride=2)
        self.readout = nn.Linear(24 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        return self.readout(x.flatten(1))


# --- The client --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What a client sends of one image, by the name of the parameter.

    Attributes:
        values: what is sent.
        factors: by what the attacker multiplies gradients before they are compared with it.
    """

    values: Gradients
    factors: Gradients


def train(model: nn.Module, digits: Digits) -> None:
    """Train a network, with its rules if it has any."""
    batches = [torch.randperm(len(digits.train_labels)).split(32) for _ in range(EPOCHS)]
    learn(model, digits, itertools.chain(*batches), LEARNING_RATE, momentum=0.9)


def let_rules_work(model: nn.Module, digits: Digits, steps: int) -> None:
    """Let rules see some batches, and change their state but no weight."""
    learn(model, digits, torch.randperm(len(digits.train_labels)).split(32)[:steps], 0.0, momentum=0.0)


def learn(model: nn.Module, digits: Digits, batches: Iterable[Tensor], learning_rate: float, momentum: float) -> None:
    """Take a step of SGD for each batch of images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    dtype = next(model.parameters()).dtype
    with biofx.attach(model, optimizer) if isinstance(model, fx.GraphModule) else contextlib.nullcontext():
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[batch].to(dtype)), digits.train_labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    dtype = next(model.parameters()).dtype
    return (model(digits.test_images.to(dtype)).argmax(1) == digits.test_labels).float().mean().item()


def folded(model: nn.Module) -> nn.Module:
    """The network as a server sees it."""
    return biofx.fold(model) if isinstance(model, fx.GraphModule) else copy.deepcopy(model)


def weights(network: nn.Module) -> Gradients:
    return {name: weight.detach() for name, weight in network.named_parameters()}


def connections(model: nn.Module, *, attached: bool) -> Gradients:
    """The gradient of every connection: the sum over its synapses, each of which gets 1/√Γ of it if attached."""
    result = {}
    for name, _ in ConvNet().named_parameters():
        is_weight = isinstance(model, fx.GraphModule) and name in biofx.weight_sites(model)
        site = biofx.weight_sites(model)[name] if is_weight else None
        gradient = model.get_parameter(name).grad if site is None else site.raw.grad
        assert gradient is not None
        is_split = site is not None and site.is_split
        result[name] = gradient.sum(0) / (len(gradient) ** 0.5 if attached else 1) if is_split else gradient.clone()
    return result


def send(model: nn.Module, image: Tensor, label: Tensor, view: str) -> Gradients:
    """What a client sends that learns from one image."""
    model = copy.deepcopy(model)
    before = weights(folded(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if isinstance(model, fx.GraphModule) and view != UNATTACHED:
        biofx.attach(model, optimizer)
    F.cross_entropy(model(image[None]), label[None]).backward()
    if view in (GRADIENT, UNATTACHED):
        return connections(model, attached=view == GRADIENT)
    optimizer.step()
    after = weights(folded(model))
    return {name: (before[name] - after[name]) / LEARNING_RATE for name in before}


def all_sent(model: nn.Module, plain: nn.Module, image: Tensor, label: Tensor, view: str, penalty: float) -> Sent:
    """What a client sends, and what is reconstructed from it; `plain` computes the same and has no rules."""
    values = send(model, image, label, view)
    factors = {name: torch.ones_like(value) for name, value in values.items()}
    if view == KNOWN:
        sites = biofx.weight_sites(model) if isinstance(model, fx.GraphModule) else {}
        for name, gradient in send(plain, image, label, UPDATE).items():
            learned = values[name] - penalty * plain.get_parameter(name).detach().sign() * (name in sites)
            ratio = learned / gradient  # 0/0 and x/0, of which no gain is the reason, are not explained
            explained = (ratio > 0) & (ratio <= 1.01 * LARGEST_GAIN)
            values[name] = torch.where(explained, gradient, 0)
            factors[name] = explained.to(gradient.dtype)
    return Sent(values, factors)


# --- The attacker ------------------------------------------------------------------------------------------------


def invert(
    network: nn.Module, sent: list[Sent], labels: Tensor, smoothness: Tensor, iterations: int, seed: int
) -> Tensor:
    """The images that an attacker finds, one for each thing that was sent, shape (attacks, 1, 8, 8)."""
    known = weights(network)

    def loss(parameters: Gradients, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (image[None],)), label[None])

    def objective(image: Tensor, label: Tensor, smooth: Tensor, values: Gradients, factors: Gradients) -> Tensor:
        own = grad(loss)(known, image, label)
        found, target = (
            torch.cat([x.flatten() for x in each])
            for each in ([own[name] * factors[name] for name in own], [values[name] for name in own])
        )
        cosine = found @ target / (found.norm() * target.norm() + 1e-30)
        variation = image.diff(dim=1).abs().mean() + image.diff(dim=2).abs().mean()
        return 1 - cosine + smooth * variation

    values, factors = (
        {name: torch.stack([getattr(each, what)[name] for each in sent]) for name in known}
        for what in ("values", "factors")
    )
    best, lowest = torch.zeros(len(sent), 1, 8, 8).double(), torch.full((len(sent),), torch.inf).double()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STARTS):
        images = (
            torch.rand(1, 1, 8, 8, generator=generator).double().repeat(len(sent), 1, 1, 1)
        )  # the same for all conditions
        optimizer = torch.optim.Adam([images], lr=0.1)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [iterations * k // 8 for k in (3, 5, 7)])
        for _ in range(iterations):
            images.grad = vmap(grad(objective))(images, labels, smoothness, values, factors).sign()
            optimizer.step()
            images.clamp_(0, 1)
            schedule.step()
        reached = vmap(objective)(images, labels, smoothness, values, factors)
        better = reached < lowest
        best[better], lowest[better] = images[better], reached[better]
    return best


# --- Scores ------------------------------------------------------------------------------------------------------


def scores(found: Tensor, image: Tensor) -> dict[str, float]:
    """How much a reconstruction is like the image, both (1, 8, 8)."""
    error = (found - image).square().mean()
    return {
        "MSE": error.item(),
        "PSNR": (-10 * error.clamp(min=10 ** (-LARGEST_PSNR / 10)).log10()).item(),
        "SSIM": ssim(found, image),
    }


def ssim(a: Tensor, b: Tensor) -> float:
    """The mean structural similarity over all windows of 5 × 5 pixels."""
    mean = functools.partial(F.avg_pool2d, kernel_size=5, stride=1)
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return similarity.mean().item()


# --- The experiment ----------------------------------------------------------------------------------------------


Key = tuple[str, str]  # a condition, and what is sent
KEYS: list[Key] = [(name, view) for name, condition in CONDITIONS.items() for view in condition.views]


@dataclass(frozen=True)
class Job:
    """Attacks on one network, in one state, with several λ for each condition and what is sent in it."""

    state: str
    seed: int
    iterations: int
    total_variations: Mapping[Key, tuple[float, ...]]


@dataclass(frozen=True)
class Found:
    """What the attacks on one network came to.

    Attributes:
        scores: the mean over images of each metric, for each λ.
        accuracies: the test accuracy of the plain network, and of those with weights of their own.
        images: the images, shape (IMAGES, 1, 8, 8).
        reconstructions: what was found, of the same shape, with the last λ.
    """

    scores: dict[Key, list[dict[str, float]]]
    accuracies: dict[str, float]
    images: Tensor
    reconstructions: dict[Key, Tensor]


def run(job: Job) -> Found:
    """Attack one network in all conditions."""
    torch.manual_seed(job.seed)
    digits = load()
    plain: nn.Module = ConvNet()
    untrained = copy.deepcopy(plain).double()
    if job.state == STATES[1]:
        train(plain, digits)
    plain.double()  # the gradient of what a network has learned is small
    chosen = torch.randperm(len(digits.test_labels))[:IMAGES]
    images, labels = digits.test_images[chosen].double(), digits.test_labels[chosen]
    batches: dict[str, list[tuple[Key, float, int, Sent]]] = {}  # by who has the same weights
    networks: dict[str, nn.Module] = {}
    found = Found({}, {}, images, {})
    for name, condition in CONDITIONS.items():
        owner = name if condition.own_weights else PLAIN
        model = plain
        if name != PLAIN:
            start = untrained if condition.own_weights else plain
            model = biofx.transform(start, condition.pipeline, example_inputs=images, seed=job.seed)
        if condition.own_weights and job.state == STATES[1]:
            train(model, digits)
        let_rules_work(model, digits, condition.steps)
        networks[owner] = folded(model)
        found.accuracies[owner] = accuracy(model, digits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one warns that a model is not attached
            for view in condition.views:
                sent = [
                    all_sent(model, plain, images[index], labels[index], view, condition.penalty)
                    for index in range(IMAGES)
                ]
                key = name, view
                batches.setdefault(owner, []).extend(
                    (key, smooth, index, sent[index]) for smooth in job.total_variations[key] for index in range(IMAGES)
                )
    for owner, batch in batches.items():
        keys, smooth, which, sent = zip(*batch, strict=True)
        smoothness, own = torch.tensor(smooth).double(), labels[list(which)]
        images_found = invert(networks[owner], list(sent), own, smoothness, job.iterations, job.seed)
        for place in range(0, len(batch), IMAGES):
            found.reconstructions[keys[place]] = images_found[place : place + IMAGES]
            each = [*map(scores, images_found[place : place + IMAGES], images)]
            means = {metric: sum(score[metric] for score in each) / IMAGES for metric in METRICS}
            found.scores.setdefault(keys[place], []).append(means)
    return found


def tuned(found: list[Found]) -> dict[Key, tuple[float, ...]]:
    """The λ with the highest PSNR for each condition, on average over networks."""
    result = {}
    for key in KEYS:
        sums = [sum(each.scores[key][place]["PSNR"] for each in found) for place in range(len(TOTAL_VARIATIONS))]
        result[key] = (TOTAL_VARIATIONS[sums.index(max(sums))],)
    return result


Results = dict[str, list[Found]]


def comparisons(results: Results) -> dict[str, dict[str, Comparison]]:
    """Differences of PSNR from what the plain network sends, by state."""
    return {
        state: compare(
            {
                f"{condition}: {view}": [each.scores[condition, view][0]["PSNR"] for each in found]
                for condition, view in KEYS
            },
            plain=f"{PLAIN}: {GRADIENT}",
        )
        for state, found in results.items()
    }


def rows_of(state: str, found: list[Found], tests: dict[str, Comparison]) -> list[dict[str, str]]:
    """What came out, as people read it: one row for each mechanism and what is sent."""
    rows = []
    for condition, view in KEYS:
        test = tests.get(f"{condition}: {view}")
        row = {"network": state, "mechanism": condition, "sent": view}
        for metric, form in zip(METRICS, ("{:.4f}", "{:.1f}", "{:.2f}"), strict=True):
            row[metric] = Estimate.of(each.scores[condition, view][0][metric] for each in found).text(form)
        row["PSNR − plain"] = "–" if test is None else test.difference.text("{:.1f}")
        row["p, corrected"] = "–" if test is None else f"{test.corrected:.2g}"
        rows.append(row)
    return rows


def numbers(results: Results, tests: dict[str, dict[str, Comparison]]) -> Mapping[str, Any]:
    return {
        "test accuracy": {
            state: {name: Estimate.of(each.accuracies[name] for each in found) for name in found[0].accuracies}
            for state, found in results.items()
        },
        "results": {
            state: {
                f"{condition}: {view}": {
                    metric: Estimate.of(each.scores[condition, view][0][metric] for each in found) for metric in METRICS
                }
                for condition, view in KEYS
            }
            for state, found in results.items()
        },
        "PSNR, compared with the gradient of the plain network": tests,
    }


def plot_images(axes: Axes, found: Found) -> None:
    """The images, and their reconstructions from updates by an attacker who ignores gains, by condition."""
    columns = [found.images, *(found.reconstructions[condition, UPDATE] for condition in CONDITIONS)]
    axes.imshow(torch.cat([torch.cat([*column[:, 0]]) for column in columns], 1), cmap="gray_r", vmin=0, vmax=1)
    for place in range(1, len(columns)):
        axes.axvline(8 * place - 0.5, color="white", linewidth=4)
    for place in range(1, IMAGES):
        axes.axhline(8 * place - 0.5, color="white", linewidth=4)
    places = [8 * place + 3.5 for place in range(len(columns))]
    axes.set_xticks(places, ["image", *CONDITIONS], rotation=20, ha="left", fontsize="small")
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_scores(axes: Axes, found: list[Found]) -> None:
    """PSNR by condition and by what was sent."""
    width = 0.8 / len(COLORS)
    for offset, (view, color) in enumerate(COLORS.items()):
        places, estimates = [], []
        for place, (name, condition) in enumerate(CONDITIONS.items()):
            if view in condition.views:
                places.append(place + (offset - 1.5) * width)
                estimates.append(Estimate.of(each.scores[name, view][0]["PSNR"] for each in found))
        errors = [each.high - each.mean for each in estimates]
        axes.bar(
            places, [each.mean for each in estimates], width, yerr=errors, color=color, label=view, ecolor="dimgray"
        )
    axes.set_xticks(range(len(CONDITIONS)), [*CONDITIONS], fontsize="small")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(ylabel="PSNR (dB)")


def plot(results: Results) -> Figure:
    figure = Figure(figsize=(13, 11), layout=ConstrainedLayoutEngine(h_pad=0.08))  # without pyplot
    panels = figure.subplots(4, 1, height_ratios=[3, 2, 3, 2])
    for place, (state, found) in enumerate(results.items()):
        images, bars = panels[2 * place : 2 * place + 2]
        plot_images(images, found[0])
        plot_scores(bars, found)
        images.set_title(f"reconstructed from updates, {state}", loc="left", fontsize="medium")
        bars.set_title(f"how close reconstructions are, {state}", loc="left", fontsize="medium")
    panels[1].legend(title="what is sent", fontsize="small", ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle("Does plasticity hide the image that a client learned from?", x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(f"Mean and 95% interval over networks: {len(found)}, {IMAGES} images each", fontsize="small")
    return figure


def main() -> None:
    arguments = parse_arguments("Digits reconstructed from what a client sends.", 5, 2)
    report = Report("gradient_inversion", arguments)
    headline("Attacking")
    iterations = QUICK_ITERATIONS if arguments.quick else ITERATIONS
    validation = [
        Job(state, VALIDATION_SEED + seed, iterations, dict.fromkeys(KEYS, TOTAL_VARIATIONS))
        for state in STATES
        for seed in range(VALIDATION_SEEDS)
    ]
    tried = in_processes(run, validation, unit="network")
    best = {
        state: tuned([f for f, job in zip(tried, validation, strict=True) if job.state == state]) for state in STATES
    }
    jobs = [Job(state, seed, iterations, best[state]) for seed in range(arguments.seeds) for state in STATES]
    results: Results = {state: [] for state in STATES}
    for job, found in zip(jobs, in_processes(run, jobs, unit="network"), strict=True):
        results[job.state].append(found)
    tests = comparisons(results)
    rows = {state: rows_of(state, found, tests[state]) for state, found in results.items()}
    for state, found in results.items():
        headline(f"How close are reconstructions? {state}; mean and 95% interval over networks")
        print(tabulate(rows[state], headers="keys", disable_numparse=True))
        accuracies = (
            f"{name} {Estimate.of(each.accuracies[name] for each in found).text()}" for name in found[0].accuracies
        )
        print(f"\nTest accuracy: {', '.join(accuracies)}")
    numbers_of_all = {"rows": [row for each in rows.values() for row in each], **numbers(results, tests)}
    report.write(numbers_of_all, plot(results))


if __name__ == "__main__":
    main()
