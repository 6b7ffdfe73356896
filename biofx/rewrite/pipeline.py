"""Pipeline: runs passes in canonical order, and times and verifies each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from biofx.analysis.sites import find_weights
from biofx.base.comparison import difference, is_rounded
from biofx.base.copying import copied
from biofx.base.errors import PipelineError, VerificationError
from biofx.base.isolation import run_in_mode
from biofx.base.precision import amplification, outputs_differ
from biofx.base.randomness import fixed_defaults
from biofx.looking.inspection import table
from biofx.model.chain import attribute, number_nodes
from biofx.model.provenance import PassRun, is_transformed, record_of
from biofx.model.slots import Slot
from biofx.model.synapses import stored
from biofx.output.fold import fold
from biofx.rewrite.model_editor import ModelEditor
from biofx.rewrite.verification import refuse_violations

if TYPE_CHECKING:
    from biofx.analysis.understanding import Run, Understanding
    from biofx.rewrite.registry import Pass

Printer = Callable[[str], object]


def run(
    bio: fx.GraphModule,
    passes: Sequence[Pass],
    excluded: dict[str, str],
    seed: int,
    understood: Understanding | None,
    original: nn.Module | None,
    *,
    outputs: list[Tensor] | None,
    check: bool,
    repeats: bool = True,
    print_between: Printer | None = None,
    values_will_be_loaded: bool = False,
) -> list[Tensor] | None:
    """Run passes on a captured model in canonical order: from the operator inwards.

    So a pass that changes the shape of a weight runs before one that draws a number for each of its entries. A pass
    that changes the set of units runs first.

    Args:
        bio: the model, changed in place.
        passes: the passes.
        excluded: weights that no pass may touch, each with the reason.
        seed: seed of all random draws.
        understood: the analysis of a recorded run; None if the model could not be run. Passes that preserve the
            function are checked on the same run.
        original: the model of which `bio` is a copy; None if it shares its tensors.
        outputs: what the model returns on the inputs of that run, if two runs have agreed on it.
        check: verify the model after each pass.
        repeats: whether two runs of the model return the same, as far as is known.
        print_between: called with the graph's text after each pass.
        values_will_be_loaded: whether the caller replaces all values afterwards.

    Returns:
        The model's outputs, if they are repeatable and every pass preserved them; else None.

    Raises:
        PipelineError: two passes exclude each other.
        VerificationError: a pass broke an invariant.
    """
    if not check or understood is None or not any(p.preserves_function for p in passes):
        outputs = None
    elif outputs is None and repeats:
        outputs = repeated_outputs(bio, understood.run)
    repeats = outputs is not None
    ordered = sorted(passes, key=lambda p: (not p.changes_units, -p.slot, p.name))
    _refuse_conflicts(bio, ordered, excluded)
    for pass_ in ordered:
        run = understood.run if understood is not None and repeats else None
        if run is not None and outputs is None and pass_.preserves_function:  # an earlier pass changed them
            outputs = _outputs(bio, pass_, run)
        with fixed_defaults():
            editor = ModelEditor(bio, pass_, seed, excluded, understood, values_will_be_loaded=values_will_be_loaded)
            _run_one(bio, pass_, editor)
            understood = editor.understood
            if check:
                _verify_after(bio, pass_)
        outputs = None if run is None or outputs is None else _unchanged(bio, pass_, run, outputs, original)
        if print_between is not None:
            print_between(f"after {pass_}:\n{table(bio)}")
    number_nodes(bio)
    bio.meta["biofx"] = {
        "passes": [
            {"pass": str(run.pass_), "seed": run.seed, "seconds": run.seconds, "weights": sorted(run.weights)}
            for run in record_of(bio).passes
        ]
    }
    return outputs


def repeated_outputs(bio: fx.GraphModule, run: Run) -> list[Tensor] | None:
    """The model's outputs if two runs agree; None if it draws from a random number generator of its own."""
    bio.recompile()
    once, again = (run_in_mode(bio, run) for _ in range(2))
    return once if outputs_differ(bio, run, once, again) is None else None


def _refuse_conflicts(bio: fx.GraphModule, passes: Sequence[Pass], excluded: dict[str, str]) -> None:
    for name in find_weights(bio).sites:
        if name in excluded:
            continue
        earlier = [run.pass_ for run in record_of(bio).passes if name in run.weights]
        for old, new in combinations([*earlier, *passes], 2):
            if old.name == new.name:
                raise PipelineError(
                    f"{name} has {old} already, and a weight can have {new.name} only once "
                    "(use exclude to give other weights other options)"
                )
            reshapes = new.slot in (Slot.SUM, Slot.OUTPUT) and old.slot < new.slot
            if old in earlier and new not in earlier and (reshapes or new.changes_units):
                raise PipelineError(
                    f"{new.name} changes the shape of {name} or of its operator's output, and {old.name} "
                    "fits the present shape only; transform the original model with both"
                )
            if (old.changes_units or new.changes_units) and Slot.OUTPUT in (old.slot, new.slot):
                raise PipelineError(
                    f"{old.name} and {new.name} exclude each other on {name}: one gives every unit a sign, and the "
                    "other joins units of both signs; drop one"
                )
            if old.slot is new.slot and new.slot.exclusive:
                raise PipelineError(f"{old.name} and {new.name} both claim the {new.slot.label} of {name}; drop one")


def _run_one(bio: fx.GraphModule, pass_: Pass, model: ModelEditor) -> None:
    start = time.perf_counter()
    left = {name: reason for name, reason in model.excluded.items() if name in model.all_sites}
    with torch.no_grad():
        pass_.rewrite_model(model)
        for edit in model.edits.values():
            if edit.reason is None and pass_.acts_at_step:
                edit.count_steps()
    changed = {name for name, edit in model.edits.items() if edit.reason is None and edit.changed}
    left |= {name: e.reason or "it changed nothing" for name, e in model.edits.items() if name not in changed}
    remarks = {name: "; ".join(edit.remarks) for name, edit in model.edits.items() if edit.remarks}
    seconds = time.perf_counter() - start
    record = record_of(bio)
    record.passes.append(PassRun(pass_, model.seed, frozenset(changed), left, remarks, seconds))
    record.shapes = {name: stored(bio, name).shape for run in record.passes for name in run.weights}


def _verify_after(bio: fx.GraphModule, pass_: Pass) -> None:
    try:
        refuse_violations(bio)
    except VerificationError as error:
        raise VerificationError([f"after {pass_.name}: {v}" for v in error.violations]) from None


def _outputs(bio: fx.GraphModule, pass_: Pass, run: Run | None) -> list[Tensor]:
    bio.recompile()
    try:
        return run_in_mode(bio, run)
    except Exception as error:
        raise VerificationError(
            [
                f"{pass_.name}: {type(bio).__name__} fails after the pass: {error}; if forward needs a parameter where "
                "a weight is a computed tensor now, exclude the weight"
            ]
        ) from error


def _unchanged(
    bio: fx.GraphModule, pass_: Pass, run: Run, before: list[Tensor], original: nn.Module | None
) -> list[Tensor] | None:
    """The model's outputs after a pass that must preserve them; None after another pass."""
    if not pass_.preserves_function:
        return None
    after = _outputs(bio, pass_, run)
    found = outputs_differ(bio, run, before, after)
    if found is not None and (original is None or not _only_rounds(bio, original, run, after)):
        advice = amplification(bio, run, after)
        raise VerificationError(
            [
                f"{pass_.name} says that it preserves the function, but on the inputs with which the model ran "
                f"{found}{advice}"
            ]
        )
    return after


def _only_rounds(bio: fx.GraphModule, original: nn.Module, run: Run, after: list[Tensor]) -> bool:
    """Whether a model computes what the original does with weights that differ only in their last digits.

    Then the pass is right, and the model amplifies rounding, as chaotic networks do.
    """
    plain = fold(original) if is_transformed(original) else copied(original)
    with torch.no_grad():
        for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
            new = _tensor(bio, name)
            if new is None or not is_rounded(tensor, new):
                return False
            tensor.copy_(new)
    return difference(after, run_in_mode(plain, run)) is None


def _tensor(bio: fx.GraphModule, name: str) -> Tensor | None:
    """The effective weight, or another tensor, of a name; None if there is none."""
    try:
        found = attribute(bio, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
