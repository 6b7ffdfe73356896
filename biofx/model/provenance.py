"""What the compiler did to a model: which pass inserted which node, for which weight, in which slot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import fx, nn

from biofx.base.errors import ArgumentError
from biofx.model.synapses import stored_parameters, synapses_in, synapses_of

if TYPE_CHECKING:
    from biofx.model.slots import Inserted, Slot
    from biofx.training.attachment import Attachment
    from biofx.weights.facts import WeightFacts

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
RECORD = "biofx"  # the attribute of a transformed model that is its Record, and the key in `node.meta`


class RunnablePass(Protocol):
    """What the record needs to know of a pass; `biofx.rewrite.registry.Pass` is one."""

    @property
    def name(self) -> str:
        """The pass's name."""

    @property
    def slot(self) -> Slot:
        """The slot that it fills."""

    @property
    def changes_units(self) -> bool:
        """Whether it changes which units there are."""

    @property
    def preserves_function(self) -> bool:
        """Whether the model computes the same after the pass as before."""

    @property
    def instead(self) -> str:
        """What to use to keep the function, if there is something."""

    @property
    def acts_at_step(self) -> bool:
        """Whether it does something around `optimizer.step()`."""


@dataclass(frozen=True)
class PassRun:
    """One pass that ran.

    Attributes:
        pass_: the pass, with its options.
        seed: what its random draws depend on, together with the weight's name.
        weights: the weights that it changed.
        left: the weights that it left alone, each with the reason.
        remarks: what it has to say about weights that it changed.
        seconds: how long it took.
    """

    pass_: RunnablePass
    seed: int
    weights: frozenset[str]
    left: dict[str, str]
    remarks: dict[str, str]
    seconds: float


class Record:
    """The attribute `biofx` of a transformed model: what the compiler did.

    Args:
        model: the original model.
        captured: fingerprint of the graph that was captured of it.
        constants: names of the buffers for tensors that forward itself makes.

    Attributes:
        original: names of the parameters of the original model.
        model_class: class of the original model; None if that was a graph.
        captured: fingerprint of the graph as it was captured.
        constants: names of the buffers for tensors that forward itself makes.
        traced: paths of the modules whose forward became a part of the graph.
        islands: modules whose Python forward the graph calls as it is, by path, each with the reason; the path of the
            model itself is empty.
        weights: what is known of every parameter that is made of synapses, by name.
        others: why other parameters are not, by name.
        inputs: the inputs with which the model ran to find that out, in words; empty if it did not run.
        notes: what a reader should know of that run.
        synapses: names of the weights that have synapses.
        shapes: the shapes in which the weights are stored that passes changed.
        nonnegative: the parameters that may not become negative, each with the pass that asks for it.
        passes: the passes that ran, in order.
        attachments: the connections with optimizers (`biofx.attach`); a copy of the model starts with none.
        by_hand: whether rules are called by hand (`BioConverter`) instead of by an optimizer.
    """

    def __init__(self, model: nn.Module, captured: str, constants: Iterable[str]) -> None:
        self.original = tuple(name for name, _ in model.named_parameters())
        self.model_class = None if isinstance(model, fx.GraphModule) else type(model)
        self.captured = captured
        self.constants = tuple(constants)
        self.traced: tuple[str, ...] = ()
        self.islands: dict[str, str] = {}
        self.weights: dict[str, WeightFacts] = {}
        self.others: dict[str, str] = {}
        self.inputs = ""
        self.notes: list[str] = []
        self.synapses: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        self.nonnegative: dict[str, str] = {}
        self.passes: list[PassRun] = []
        self.attachments: WeakSet[Attachment] = WeakSet()  # the optimizers hold them
        self.by_hand = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "attachments"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, attachments=WeakSet())

    @property
    def attached(self) -> set[str]:
        """The weights on which rules act at the steps of an optimizer."""
        return {name for attachment in self.attachments for name in attachment.weights}

    def __str__(self) -> str:
        """The pipeline that made the model."""
        return ",".join(str(run.pass_) for run in self.passes)


def transformed(model: nn.Module) -> fx.GraphModule:
    """The transformed model that was given, bare or inside `torch.compile` or a data-parallel wrapper.

    Raises:
        ArgumentError: it does not come from `biofx.transform`, or its weights were replaced since.
    """
    bio = unwrapped(model)
    for replaced in changed_since(bio):
        raise ArgumentError(
            f"{replaced}; prune, parametrize, resize or replace modules of the original model, and then transform it"
        )
    return bio


def changed_since(bio: nn.Module) -> Iterator[str]:
    """What passes rewrote or keep in a transformed model, and is not there any more, each in words."""
    record = record_of(bio)
    parameters = dict(stored_parameters(bio, remove_duplicate=False))
    for name, shape in record.shapes.items():
        if name not in parameters:
            yield f"{name}, which has synapses since the transform, is no parameter of the model any more"
        elif name in record.synapses and synapses_of(bio, name) is None:
            yield f"{name}, which has synapses since the transform, is a plain parameter now"
        elif parameters[name].shape != shape:
            now = tuple(parameters[name].shape)
            yield f"{name}, which has synapses since the transform, was {tuple(shape)} then and is {now} now"
    for name, synapses in synapses_in(bio).items():
        for key, by in synapses.users.items():
            if key not in synapses._buffers:
                yield f"{key} of {name}, which {', '.join(by)} keeps, is gone"


def unwrapped(model: nn.Module) -> fx.GraphModule:
    """A transformed model without wrappers; its weights may have been replaced."""
    bio = model
    while isinstance(bio, nn.Module) and not is_transformed(bio):
        wrapped = "_orig_mod" if "_orig_mod" in bio._modules else "module" if isinstance(bio, WRAPPERS) else None
        if wrapped is None:
            break
        bio = bio.get_submodule(wrapped)
    record_of(bio)
    assert isinstance(bio, fx.GraphModule)
    return bio


def is_transformed(model: Any) -> bool:
    """Whether a model comes from `biofx.transform`; not one in which such a model is a module."""
    return isinstance(model, nn.Module) and isinstance(vars(model).get(RECORD), Record)


def record_of(bio: nn.Module) -> Record:
    """The record of a transformed model.

    Raises:
        ArgumentError: `bio` does not come from `biofx.transform`.
    """
    if not is_transformed(bio):
        given = f"the class {bio.__name__}" if isinstance(bio, type) else f"an instance of {type(bio).__name__}"
        raise ArgumentError(
            f"expected a model made by biofx.transform, got {given}; a graph that was traced again has lost its record"
        )
    return cast(Record, vars(bio)[RECORD])


def inserted(node: fx.Node) -> Inserted | None:
    """Who inserted a node, or None for a node of the original model."""
    return node.meta.get(RECORD)


def inserted_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Inserted]]:
    """The nodes that passes inserted, in graph order."""
    for node in graph.nodes:
        origin = inserted(node)
        if origin is not None:
            yield node, origin
