"""Figures by matplotlib, in `biofx.plot`: what training did, and what weights, gains and units look like.

Each function draws one figure into `ax` and returns it, so figures can be combined and changed:

    figure, (left, right) = plt.subplots(1, 2)
    biofx.plot.gains(bio, ax=left)
    biofx.plot.eigenvalues(bio, "rnn.weight_hh_l0", ax=right).set_title("after training")

Without `ax`, pyplot makes a new one. Without matplotlib (`pip install 'biofx[draw]'`), all raise `ExportError`. Orange
stands for excitation, and blue for inhibition. The colours are those of Okabe and Ito, which the colour-blind can tell
apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from biofx.analysis.sites import WeightSite, weight_sites
from biofx.analysis.units import EFFECTS, Units
from biofx.analysis.units import units as find_units
from biofx.base.errors import ArgumentError
from biofx.base.gains import CRYSTALLIZED
from biofx.base.packages import require
from biofx.looking.vector import plain
from biofx.looking.view import written_shape
from biofx.model.provenance import is_transformed, without_wrappers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from biofx.training.history import History

__all__ = ["eigenvalues", "gains", "history", "singular_values", "units", "weights"]

ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#666666"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
COLOURS = dict(zip(EFFECTS, ("#DDDDDD", ORANGE, BLUE, "#F0E442", "#555555"), strict=True))
LISTED = 12  # the largest number of names in a legend
BINS = 100

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Quantity:
    """What of a history is drawn.

    Attributes:
        line: the column of the line.
        bands: the columns between which bands lie, the widest first.
        label: of the vertical axis.
        is_share: whether it is written in percent.
        level: a height with a meaning, and what it means.
        needs: what weights need to have it.
    """

    line: str
    label: str
    bands: tuple[tuple[str, str], ...] = ()
    is_share: bool = False
    level: tuple[float, str] | None = None
    needs: str = ""


_QUANTITIES = {
    "gain": _Quantity("gain_mean", "gain: mean ± standard deviation", (("gain_low", "gain_high"),), level=(1, "")),
    "learning_rate": _Quantity("learning_rate", "effective learning rate", needs='an optimizer with an "lr"'),
    "crystallized": _Quantity("crystallized", f"synapses with a gain below {CRYSTALLIZED}", is_share=True),
    "turnover": _Quantity("turnover", "replacements of a synapse so far", needs="passes.Rejuvenate"),
    "excitation": _Quantity("excitation", "excitation's share of Σ|w|", is_share=True, level=(0.5, "balance")),
    "weight": _Quantity(
        "weight_q50",
        "effective weight: median, 50 % and 90 %",
        (("weight_q05", "weight_q95"), ("weight_q25", "weight_q75")),
        level=(0, ""),
    ),
}


def history(
    history: History, quantity: str = "gain", *, weights: str | Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what `biofx.record` recorded: one quantity over the steps of training, a line for each weight.

    - `"gain"`: the mean gain, and a band of one standard deviation, cut off at the smallest and the largest gain.
    - `"learning_rate"`: the effective learning rate.
    - `"crystallized"`: the share of synapses with a gain below ½.
    - `"turnover"`: how often a synapse was replaced so far, on average.
    - `"excitation"`: the share of excitation in Σ|w|; the dotted line at 50 % is balance.
    - `"weight"`: the median of effective weights, with bands that hold 50 % and 90 % of them.

    `help(biofx.record)` has the equations.

    Args:
        history: what `biofx.record` returned.
        quantity: the quantity.
        weights: names of the weights to draw. Default: all that have the quantity.
        ax: where to draw. Default: a new figure.

    Raises:
        ArgumentError: an unknown quantity or weight, or no weight has the quantity.

    Example:
        >>> import biofx, torch
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), "fuzzy-learning-rates")
        >>> recorded = biofx.record(bio, torch.optim.SGD(bio.parameters(), lr=0.1))
        >>> ax = biofx.plot.history(recorded, "gain")
        >>> ax.get_xlabel(), [line.get_label() for line in ax.lines[:1]]
        ('optimizer step', ['weight'])
    """
    rows = _rows_of(history)
    if not isinstance(quantity, str) or quantity not in _QUANTITIES:
        raise ArgumentError(f"plot.history: quantity must be one of {', '.join(_QUANTITIES)}; got {quantity!r}")
    chosen = _QUANTITIES[quantity]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["weight"], []).append(row)
    drawn = _chosen(series, weights, "history", "the history")
    drawn = {name: own for name, own in drawn.items() if any(row[chosen.line] is not None for row in own)}
    if not drawn:
        needs = f"; it takes {chosen.needs}" if chosen.needs else ""
        raise ArgumentError(f'plot.history: none of the weights has the quantity "{quantity}"{needs}')
    ax = _axes(ax, "history")
    strength = max(0.06, 0.25 / len(drawn))
    for index, (name, own) in enumerate(drawn.items()):
        colour, steps = _colour(index, len(drawn)), [row["step"] for row in own]
        for low, high in chosen.bands:
            ax.fill_between(steps, _column(own, low), _column(own, high), color=colour, alpha=strength, linewidth=0)
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, _column(own, chosen.line), color=colour, label=plain(name), linewidth=1.8, marker=marker)
    if chosen.level is not None:
        height, meaning = chosen.level
        ax.axhline(height, color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        if meaning:
            ax.text(0.99, height, meaning, transform=ax.get_yaxis_transform(), color=GREY, ha="right", va="bottom")
    if chosen.is_share:
        ax.yaxis.set_major_formatter(require("matplotlib.ticker", "plot.history", "draw").PercentFormatter(1))
    if quantity in ("crystallized", "turnover", "learning_rate"):
        ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    _tidy(ax, xlabel="optimizer step", ylabel=chosen.label, grid=True)
    named = {plain(name) for name in drawn}
    lines = [line for line in ax.lines if line.get_label() in named]
    shown = range(len(lines)) if len(lines) <= LISTED else (i * (len(lines) - 1) // (LISTED - 1) for i in range(LISTED))
    ax.legend(handles=[lines[index] for index in shown], frameon=False, fontsize="small")
    return ax


def weights(model: nn.Module | Units, name: str, *, ax: Axes | None = None) -> Axes:
    r"""Draw an effective weight as a matrix, with a column for each presynaptic position, sorted by sign.

    Columns are sorted by the share of excitation, Σ max(w, 0) ÷ Σ\|w\|; among equals, their order stays. The strip
    above the matrix shows what a column does: excites (orange), inhibits (blue), both (yellow), nothing (grey). Rows
    are postsynaptic units; of weights with more than two axes, such as kernels of convolutions, all outgoing
    connections of a position. Colours are cut off at the 99.5 % quantile of \|w\|.

    Args:
        model: a transformed model; or any other, which runs once on inputs that are guessed; or, if these do not fit,
            `biofx.units(model, example_inputs)`.
        name: the weight's name in the original model.
        ax: where to draw. Default: a new figure.

    Raises:
        ArgumentError: the model has no such weight, its axes are not known, it has values that are not finite, or the
            model could not run.

    Example:
        >>> import biofx, torch
        >>> ax = biofx.plot.weights(torch.nn.Linear(8, 2), "weight")
        >>> ax.images[0].get_array().shape
        (2, 8)
    """
    site = _site(model, name, "weights")
    if site.axes is None:
        raise ArgumentError(f"plot.weights: {name}: which of its axes run over units is not known")
    columns = site.outgoing(_finite(_values(site.effective()), name, "weights"))
    exciting, total = columns.clamp(min=0).sum(1), columns.abs().sum(1)
    share = torch.where(total > 0, exciting / total, -1)  # silent units stand at the end
    order = torch.argsort(share, descending=True, stable=True)
    does = (columns > 0).any(1).long() + 2 * (columns < 0).any(1).long()  # an index into EFFECTS
    ax = _axes(ax, "weights")
    colours = require("matplotlib.colors", "plot.weights", "draw")
    scale = columns.abs().flatten().kthvalue(max(1, math.ceil(0.995 * columns.numel()))).values.item()
    scale = scale or columns.abs().max().item() or 1.0
    extend = "both" if bool((columns.abs() > scale).any()) else "neither"
    diverging = colours.LinearSegmentedColormap.from_list("excitation", _DIVERGING)
    matrix = columns[order].T.numpy()
    image = ax.imshow(matrix, cmap=diverging, vmin=-scale, vmax=scale, aspect="auto")
    strip = ax.inset_axes((0, 1.012, 1, 0.035), sharex=ax)
    listed = colours.ListedColormap([*COLOURS.values()])
    strip.imshow(does[order][None].numpy(), cmap=listed, vmin=-0.5, vmax=len(COLOURS) - 0.5, aspect="auto")
    strip.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
    for each in (ax, strip):
        each.spines[:].set_visible(False)
    counts = ((int((does == index).sum()), EFFECTS[index]) for index in (1, 2, 3, 0))
    found = ", ".join(f"{count} {_PLURAL[what]}" for count, what in counts if count)
    rows = "postsynaptic unit" if columns.shape[1] == site.units else "outgoing connection"
    ax.set(xlabel=f"presynaptic positions: {found}", ylabel=rows)
    ax.locator_params(nbins=10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    ax.set_title(plain(name), loc="left", pad=16)
    ax.figure.colorbar(image, ax=ax, label="effective weight", extend=extend, pad=0.02)
    return ax


def eigenvalues(model: nn.Module | Units, name: str, *, ax: Axes | None = None) -> Axes:
    r"""Draw the eigenvalues of a recurrent weight in the complex plane.

    Modes inside the unit circle (dotted) decay under h ← W·h, and those outside of it grow. The other circle has the
    spectral radius max\|λ\|. Eigenvalues of W and its transpose are the same, so it does not matter how it is stored.

    Args:
        model: any module, transformed or not; the effective weight is drawn.
        name: the parameter's name in the original model, such as `"rnn.weight_hh_l0"`.
        ax: where to draw. Default: a new figure.

    Raises:
        ArgumentError: the model has no such weight, or it is not square.

    Example:
        >>> import biofx, torch
        >>> biofx.plot.eigenvalues(torch.nn.RNN(3, 50), "weight_hh_l0").get_xlabel()
        'Re λ'
    """
    matrix = _matrix(model, name, "eigenvalues")
    if matrix.shape[0] != matrix.shape[1]:
        raise ArgumentError(
            f"plot.eigenvalues: {name} is {written_shape(matrix.shape)}, and only square matrices have eigenvalues; "
            "use plot.singular_values"
        )
    values = torch.linalg.eigvals(matrix)
    radius = values.abs().max().item() if len(values) else 0.0
    ax = _axes(ax, "eigenvalues")
    ax.axhline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    ax.axvline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    x, y = angle.cos().numpy(), angle.sin().numpy()
    ax.plot(x, y, ":", color=GREY, linewidth=1.2, label="unit circle")
    ax.plot(radius * x, radius * y, color=ORANGE, linewidth=1.2, label=f"spectral radius {radius:.3g}")
    dot = max(2.0, min(5.0, 100 / math.sqrt(max(len(values), 1))))
    style: dict[str, Any] = {"color": BLUE, "markersize": dot, "alpha": 0.75, "markeredgewidth": 0}
    ax.plot(values.real.numpy(), values.imag.numpy(), "o", label=f"{len(values)} eigenvalues", **style)
    reach = 1.1 * max(1.0, radius)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    _tidy(ax, xlabel="Re λ", ylabel="Im λ", title=name)
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}
    ax.legend(**below, frameon=False, fontsize="small", handlelength=1.5)
    return ax


def singular_values(model: nn.Module | Units, name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the singular values of a weight, from the largest to the smallest.

    They are those of the matrix of effective weights from presynaptic to postsynaptic units; of a weight with more than
    two axes, from all incoming connections to the postsynaptic units. The title gives the stable rank Σσ² ÷ max σ².

    Args:
        model: as for `weights`; one that is not transformed does not run if the parameter is a matrix.
        name: the parameter's name in the original model.
        ax: where to draw. Default: a new figure.

    Raises:
        ArgumentError: the model has no such weight, its axes are not known, or the model could not run.

    Example:
        >>> import biofx, torch
        >>> layer = torch.nn.Linear(3, 3)
        >>> _ = torch.nn.init.eye_(layer.weight)
        >>> biofx.plot.singular_values(layer, "weight").get_title(loc="left")
        'weight: stable rank 3'
    """
    values = torch.linalg.svdvals(_matrix(model, name, "singular_values"))
    total, largest = values.square().sum().item(), values.max().item() if len(values) else 0.0
    rank = total / largest**2 if largest else 0.0
    ax = _axes(ax, "singular_values")
    marker = "o" if len(values) <= 64 else None
    ax.plot(range(1, len(values) + 1), values.numpy(), color=BLUE, marker=marker, markersize=4, linewidth=1.5)
    ax.set_ylim(bottom=0)
    _tidy(ax, xlabel="index", ylabel="singular value", title=f"{name}: stable rank {rank:.3g}", grid=True)
    return ax


def units(model: nn.Module | Units, population: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw a map of units: a square for each, coloured by what its outgoing weights do.

    A unit excites (orange) or inhibits (blue) if all of its outgoing weights agree, over all weights that read it; it
    is mixed (yellow) if not; silent (light grey) if they are all 0; and not judged (dark grey) if a weight that may
    read it could not be judged, which `biofx.units` explains. Units stand in their order, from left to right and
    downwards, in a block for each population that a weight reads. Inputs are not units.

    Args:
        model: any module, which runs once on inputs that are guessed; or, if these do not fit,
            `biofx.units(model, example_inputs)`.
        population: the name of the one population to draw, such as `"fc1.weight"`. Default: all.
        ax: where to draw. Default: a new figure.

    Raises:
        ArgumentError: an unknown population; no weight reads any unit; or the model could not run.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.ReLU(), torch.nn.Linear(40, 2))
        >>> bio = biofx.transform(model, [passes.DalesPrinciple(excitatory=0.75, balance=False)])
        >>> [text.get_text() for text in biofx.plot.units(bio).get_legend().get_texts()]
        ['30 excite', '10 inhibit']
    """
    found = model if isinstance(model, Units) else _run(model, "units")
    members = _populations(found)
    if not members:
        raise ArgumentError("plot.units: no weight reads a unit of the network; inputs are no units")
    if population is not None:
        _check_known(population, members, "units", "the network", "population")
        members = {population: members[population]}
    effects = found.effects()
    colours, patches = (require(f"matplotlib.{part}", "plot.units", "draw") for part in ("colors", "patches"))
    total = sum(map(len, members.values()))
    across = min(max(map(len, members.values())), max(16, math.ceil(1.5 * math.sqrt(total))))
    blocks, middles, height = [], [], 0
    for numbers in members.values():
        rows = -(-len(numbers) // across)
        block = torch.full((rows * across,), math.nan)
        block[: len(numbers)] = effects[numbers].float()
        blocks += [block.view(rows, across), torch.full((1, across), math.nan)]
        middles.append(height + rows / 2)
        height += rows + 1
    cells = torch.cat(blocks[:-1]).numpy()
    ax = _axes(ax, "units", height=0.45 * len(members))
    listed = colours.ListedColormap([*COLOURS.values()])
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.6 if across <= 80 else 0.0}
    ax.pcolormesh(cells, cmap=listed, vmin=-0.5, vmax=len(COLOURS) - 0.5, **edges)
    ax.set_yticks(middles, [f"{plain(name)}\n{len(numbers)} units" for name, numbers in members.items()])
    ax.set(xlim=(0, across), ylim=(height - 1, 0), aspect="equal", xticks=[])
    ax.tick_params(left=False)
    ax.spines[:].set_visible(False)
    counts = torch.bincount(effects[torch.cat([*members.values()])], minlength=len(EFFECTS)).tolist()
    handles = [
        patches.Patch(color=COLOURS[what], label=f"{counts[EFFECTS.index(what)]} {_PLURAL[what]}")
        for what in ("excites", "inhibits", "mixed", "silent", "not judged")
        if counts[EFFECTS.index(what)]
    ]
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(handles)}
    ax.legend(handles=handles, **above, frameon=False, borderpad=0.2)
    return ax


def gains(bio: nn.Module, *, weights: str | Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw how gains are distributed: a histogram for each weight that has gains, on a logarithmic axis.

    The gain is what all gradient hooks multiply the learning of a synapse by (`WeightSite.factor`), without the noise
    of a step. What has crystallized, with a gain below ½, is orange. Heights are square roots of counts, so that few
    synapses are seen next to many, and the highest bar of each weight is equally high. Gains of 0 have no place on the
    axis, and are counted in the label.

    Args:
        bio: a model made by `biofx.transform`.
        weights: names of the weights to draw. Default: all that have gains.
        ax: where to draw. Default: a new figure.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, an unknown weight, no weight has gains, or one has gains
            that are not finite.

    Example:
        >>> import biofx, torch
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), "fuzzy-learning-rates")
        >>> [label.get_text() for label in biofx.plot.gains(bio).get_yticklabels()]
        ['weight']
    """
    chosen = _chosen(weight_sites(bio), weights, "gains", "the model")
    factors = {name: x for name, site in chosen.items() if (x := site.factor) is not None and x.numel()}
    found = {name: _finite(_values(x).flatten(), name, "gains", "gains") for name, x in factors.items()}
    if not found:
        raise ArgumentError("plot.gains: no pass gave these weights gains; passes.FuzzyLearningRates does")
    above = {name: gain[gain > 0].log10() for name, gain in found.items()}
    every = torch.cat([*above.values()])
    low, high = (every.min().item(), every.max().item()) if every.numel() else (0.0, 0.0)
    half = math.log10(CRYSTALLIZED)  # is an edge, so that no bar is half crystallized
    low, high = min(low, half) - 0.05, max(high, 0.0) + 0.05
    width = (high - low) / BINS
    first, last = math.floor((low - half) / width), math.ceil((high - half) / width)
    edges = half + width * torch.arange(first, last + 1, dtype=torch.float64)
    ax = _axes(ax, "gains", height=0.5 * len(found))
    parts = (BLUE, slice(-first, None)), (ORANGE, slice(None, -first))
    labels = []
    for row, (name, logs) in enumerate(above.items()):
        roots = torch.histogram(logs, edges).hist.sqrt()
        heights = 0.85 * roots / roots.max().clamp(min=1) - row
        for colour, part in parts:
            borders = 10 ** edges[part.start : None if part.stop is None else part.stop + 1]
            ax.stairs(heights[part].numpy(), borders.numpy(), baseline=-row, fill=True, color=colour)
        ax.axhline(-row, color="#CCCCCC", linewidth=0.8, zorder=0)
        shares = (found[name] < CRYSTALLIZED, "crystallized"), (found[name] == 0, "at 0")
        notes = [f"{share:.1%} {what}" for has, what in shares if (share := has.double().mean().item())]
        labels.append("\n".join([plain(name), ", ".join(notes)]).strip())
    ax.set_xscale("log")
    ax.set(xlim=(10**low, 10**high), ylim=(-len(found) + 0.85, 1))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.set_yticks([-row for row in range(len(found))], labels)
    ax.tick_params(axis="y", left=False)
    _tidy(ax, xlabel="gain (orange: crystallized, below ½)")
    ax.spines["left"].set_visible(False)
    return ax


_PLURAL = dict(zip(EFFECTS, ("silent", "excite", "inhibit", "mixed", "not judged"), strict=True))
_DIVERGING = ("#003A5D", BLUE, "#A9CCE3", "#FFFFFF", "#F5C6A5", ORANGE, "#6B2F00")


def _axes(ax: Axes | None, figure: str, height: float = 0.0) -> Axes:
    """The axes to draw into; new ones have at least the usual height in inches."""
    if ax is not None:
        return ax
    pyplot = require("matplotlib.pyplot", f"plot.{figure}", "draw")
    width, usual = pyplot.rcParams["figure.figsize"]
    new: Axes = pyplot.subplots(figsize=(width, max(usual, height)), layout="constrained")[1]
    return new


def _tidy(ax: Axes, *, xlabel: str, ylabel: str = "", title: str = "", grid: bool = False) -> None:
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        ax.set_title(plain(title), loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(alpha=0.25, linewidth=0.6)


def _colour(index: int, count: int) -> Any:
    """The colour of a line; of many, from dark to light in the order of the model."""
    if count <= len(PALETTE):
        return PALETTE[index]
    return require("matplotlib", "plot.history", "draw").colormaps["cividis"](index / (count - 1))


def _check_known(name: str, known: Mapping[str, Any], figure: str, where: str, what: str = "weight") -> None:
    if name not in known:
        raise ArgumentError(f'plot.{figure}: {where} has no {what} "{name}"; it has {", ".join(known) or "none"}')


def _chosen(known: Mapping[str, _T], weights: str | Sequence[str] | None, figure: str, where: str) -> dict[str, _T]:
    """Those of the known weights that are to be drawn: all, or some by their names."""
    names = known if weights is None else [weights] if isinstance(weights, str) else weights
    for name in names:
        _check_known(name, known, figure, where)
    return {name: value for name, value in known.items() if name in names}


def _rows_of(history: History) -> list[dict[str, Any]]:
    """The rows of a history, with the limits of the band of gains."""
    rows = getattr(history, "rows", None)
    if not isinstance(rows, list) or any("gain_mean" not in row for row in rows):
        raise ArgumentError(f"plot.history: give what biofx.record returned; got {type(history).__name__}")
    for row in rows:
        row["gain_low"] = max(row["gain_mean"] - row["gain_std"], row["gain_min"])
        row["gain_high"] = min(row["gain_mean"] + row["gain_std"], row["gain_max"])
    return rows


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [math.nan if row[key] is None else row[key] for row in rows]


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def _run(model: nn.Module, figure: str) -> Units:
    """The units of a model that runs on guessed inputs."""
    try:
        return find_units(model)
    except ArgumentError as error:
        raise ArgumentError(f"plot.{figure}: {error}; give biofx.units(model, example_inputs) here") from error


def _site(model: nn.Module | Units, name: str, figure: str) -> WeightSite:
    """A weight, by its name in the original model."""
    if isinstance(model, Units):
        sites = model.sites
    else:
        sites = weight_sites(model) if is_transformed(without_wrappers(model)) else _run(model, figure).sites
    _check_known(name, sites, figure, "the model")
    return sites[name]


def _matrix(model: nn.Module | Units, name: str, figure: str) -> Tensor:
    """A weight as a matrix; which of its axes is presynaptic matters only if it has more than two."""
    if isinstance(model, nn.Module) and not is_transformed(without_wrappers(model)):
        parameters = dict(model.named_parameters())
        _check_known(name, {key: p for key, p in parameters.items() if p.dim() > 1}, figure, "the model")
        if parameters[name].dim() == 2:
            return _finite(_values(parameters[name]), name, figure)
    site = _site(model, name, figure)
    value = _finite(_values(site.effective()), name, figure)
    if value.dim() == 2:
        return value
    if site.axes is None:
        raise ArgumentError(f"plot.{figure}: {name}: which of its axes run over units is not known")
    return site.incoming(value)


def _finite(value: Tensor, name: str, figure: str, what: str = "values") -> Tensor:
    if not bool(value.isfinite().all()):
        raise ArgumentError(f"plot.{figure}: {name} has {what} that are not finite")
    return value


def _populations(found: Units) -> dict[str, Tensor]:
    """The numbers of the units of each population of the network that a weight reads, by its name."""
    read = torch.cat([x for r in found.readings.values() for x in (r.numbers, r.sources)] or [found.owner[:0]])
    result: dict[str, Tensor] = {}
    for index in found.owner[read].unique().tolist():
        population = found.populations[index]
        if population.origin not in ("input", "constant"):
            result[population.name] = torch.cat((result.get(population.name, read[:0]), found.members(index)))
    return result
