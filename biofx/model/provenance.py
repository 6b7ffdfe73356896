"""Provenance: which pass inserted which node, for which weight, in which slot; the record of a transformed model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
from torch import fx, nn

from biofx.base.errors import ArgumentError, SavingError
from biofx.model.synapses import child_of

if TYPE_CHECKING:
    from biofx.model.slots import Inserted
    from biofx.rewrite.registry import Pass
    from biofx.training.attachment import Attachment
    from biofx.weights.facts import WeightFacts

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
RECORD = "biofx"  # the attribute of a transformed model that is its Record, and the key in `node.meta`

FORMAT = 2  # of pickled models: slots and moments are pickled by their numbers


@dataclass(frozen=True)
class PassRun:
    """One pass that ran.

    Attributes:
        pass_: the pass, with its options.
        seed: the seed of its random draws, together with the weight's name.
        weights: the weights that it changed.
        left: the weights that it left alone, each with the reason.
        remarks: its remarks about weights that it changed.
        seconds: its running time.
    """

    pass_: Pass
    seed: int
    weights: frozenset[str]
    left: dict[str, str]
    remarks: dict[str, str]
    seconds: float


def empty_places(model: nn.Module) -> list[str]:
    """The names of parameters and buffers that are None; weights with synapses are not."""
    return [
        f"{path}.{key}".lstrip(".")
        for path, module in model.named_modules()
        for registry in (module._parameters, module._buffers)
        for key, value in registry.items()
        if value is None and child_of(module, key) is None
    ]


def shapes(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Size]:
    """The shapes of tensors by name; that of a nested one, which has none, is empty."""
    return {name: torch.Size() if tensor.is_nested else tensor.shape for name, tensor in tensors}


@dataclass(frozen=True)
class Request:
    """One call of `biofx.transform`, which `biofx.load` repeats.

    Attributes:
        passes: the passes, with their options.
        frontend: the front end that captured the model, in the first call.
        exclude: the patterns of weights that were left alone.
        seed: the seed.
        has_inputs: whether example inputs were given.
    """

    passes: tuple[Pass, ...]
    frontend: str
    exclude: tuple[str, ...]
    seed: int
    has_inputs: bool


class Record:
    """The attribute `biofx` of a transformed model: what the compiler did.

    Args:
        model: the original model.
        captured: fingerprint of its captured graph.
        constants: names of the buffers for tensors that forward itself creates.

    Attributes:
        original: shapes of the parameters of the original model, by name.
        empty: names of its parameters and buffers that are None, which training may fill.
        model_class: class of the original model; None if that was a graph.
        captured: fingerprint of the graph as it was captured.
        constants: names of the buffers for tensors that forward itself creates.
        traced: paths of the modules whose forward is part of the graph.
        followed: the tensors in plain attributes whose present values the graph reads, by name.
        islands: untraced submodules by path, each with the reason; the path of the model itself is empty.
        weights: facts about every parameter that is a weight, by name.
        others: the reason why another parameter is not a weight, by name.
        inputs: a description of the inputs on which the model ran for this analysis; empty if it did not run.
        notes: remarks about that run.
        asked: a weight with synapses if forward asks about more than its numbers; empty if there is none.
        synapses: names of the weights that have synapses.
        shapes: the shapes of the stored tensors that passes changed.
        nonnegative: the parameters that have to stay non-negative, each with the pass that requires it.
        requests: the calls of `biofx.transform`.
        passes: the passes that ran, in order.
        changed: the parameters that were replaced or removed since the transform, each with which of the two.
        ties: the parameters that were tied to others since, each with the first of the same tensor.
        attachments: the attachments to optimizers (`biofx.attach`); a copy of the model starts with none.
        by_hand: whether the user calls the rules (`BioConverter`), not an optimizer.
    """

    def __init__(self, model: nn.Module, captured: str, constants: Iterable[str]) -> None:
        self.original = shapes(model.named_parameters())
        self.empty = empty_places(model)
        self.model_class = None if isinstance(model, fx.GraphModule) else type(model)
        self.captured = captured
        self.constants = tuple(constants)
        self.traced: tuple[str, ...] = ()
        self.followed: tuple[str, ...] = ()
        self.islands: dict[str, str] = {}
        self.weights: dict[str, WeightFacts] = {}
        self.others: dict[str, str] = {}
        self.inputs = ""
        self.notes: list[str] = []
        self.asked = ""
        self.synapses: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        self.nonnegative: dict[str, str] = {}
        self.requests: list[Request] = []
        self.passes: list[PassRun] = []
        self.changed: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self.attachments: WeakSet[Attachment] = WeakSet()  # the optimizers hold them
        self.by_hand = False

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "attachments"}
        return own | {"format": FORMAT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise SavingError(
                "the model was pickled by another version of biofx; unpickle it with that one, save its state_dict, "
                "and load that into a model that this version transformed"
            )
        own = {name: value for name, value in state.items() if name != "format"}
        vars(self).update(
            {"changed": {}, "ties": {}, "empty": [], "asked": "", "followed": (), **own}, attachments=WeakSet()
        )

    @property
    def attached(self) -> set[str]:
        """The weights on which rules act at the steps of an optimizer."""
        return {name for attachment in self.attachments for name in attachment.weights}

    def __str__(self) -> str:
        """The pipeline that made the model."""
        return ",".join(str(run.pass_) for run in self.passes)


def without_wrappers(model: Any) -> Any:
    """Return what is in `torch.compile`, a data-parallel wrapper or an average; a model without them is returned."""
    while isinstance(model, nn.Module) and not is_transformed(model):
        wrapped = "_orig_mod" if "_orig_mod" in model._modules else "module" if isinstance(model, WRAPPERS) else None
        if wrapped is None:
            break
        model = model.get_submodule(wrapped)
    return model


def unwrapped(model: nn.Module) -> fx.GraphModule:
    """Return a transformed model without wrappers; its weights may have been replaced."""
    bio = without_wrappers(model)
    record_of(bio)
    assert isinstance(bio, fx.GraphModule)
    return bio


def is_transformed(model: Any) -> bool:
    """Whether a model was made by `biofx.transform`; false for a model that contains such a model."""
    return isinstance(model, nn.Module) and isinstance(vars(model).get(RECORD), Record)


def record_of(bio: nn.Module) -> Record:
    """Return the record of a transformed model.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.
    """
    if not is_transformed(bio):
        given = f"the class {bio.__name__}" if isinstance(bio, type) else f"an instance of {type(bio).__name__}"
        raise ArgumentError(f"expected a model made by biofx.transform, got {given}; {_instead_of(bio)}")
    return cast(Record, vars(bio)[RECORD])


def _instead_of(model: Any) -> str:
    """What to do instead of giving something that is no transformed model."""
    inside = model.named_modules() if isinstance(model, nn.Module) else ()
    names = [name for name, module in inside if is_transformed(module)]
    if isinstance(model, nn.Module) and "_fsdp_wrapped_module" in model._modules:
        return "it flattens parameters, so rules find no weight; use torch.distributed.fsdp.fully_shard"
    if is_transformed(getattr(model, "module", None)):  # the public name that trainers give what they wrap
        names = ["module"]
    if names:
        return f"its submodule {names[0]} is one, so give that" + "".join(f", or {name}" for name in names[1:])
    return "a graph that was traced again has lost its record"


def inserted(node: fx.Node) -> Inserted | None:
    """Return the origin of an inserted node, or None for a node of the original model."""
    return node.meta.get(RECORD)


def inserted_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Inserted]]:
    """The nodes that passes inserted, in graph order."""
    for node in graph.nodes:
        origin = inserted(node)
        if origin is not None:
            yield node, origin
