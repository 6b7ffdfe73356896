"""Torch internals: all private and undocumented interfaces of PyTorch that biofx uses.

Each entry names the public alternative, and what it lacks. `tests/base/test_torch_internals.py` fails by name if one
changes, and lists the private attributes that are read where they are needed, such as `Module._parameters`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import is_fake
from torch.fx import config as fx_config
from torch.fx.experimental import _config as shape_config
from torch.fx.graph_module import reduce_graph_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as modules
from torch.nn.modules.module import _WrappedHook as HookWithModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _WeightNorm as WeightNormParametrization
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "CheckpointFunction",  # patching `torch.utils.checkpoint.checkpoint` misses modules that imported it by name
    "HigherOrderOperator",  # there is no public name for the classes of operators
    "HookWithModule",  # hooks that were registered with `with_kwargs` or `always_call` are public only as handles
    "OpOverload",
    "SpectralNorm",  # `torch.nn.utils.spectral_norm` is public, but not the hook that it leaves
    "StorageWeakRef",  # `weakref.ref(tensor.untyped_storage())` dies at once: each call makes another object
    "TorchDispatchMode",  # documented in "Extending PyTorch", under this private name
    "WeakTensorKeyDictionary",  # `weakref.WeakKeyDictionary` compares tensors with ==
    "WeightNorm",  # `torch.nn.utils.weight_norm` is public, but not the hook that it leaves
    "WeightNormParametrization",  # `torch.nn.utils.parametrizations.weight_norm` returns the module, not this
    "is_fake",  # `torch.compiler.is_exporting` tells of the run, and not of what is left of it
    "is_traceable_wrapper_subclass",  # `type(tensor)` does not tell whether a subclass wraps other tensors
    "pytree",  # `torch.fx.map_arg` knows only the containers of graphs
    "reduce_graph_module",  # `pickle` rebuilds a `GraphModule`, but not of a subclass
]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The registries of hooks of a module; public are only functions that add to them."""

GLOBAL_HOOKS: list[dict[int, Any]] = [vars(modules)[f"_global{name}"] for name in HOOKS]
"""The hooks of all modules; public are only functions that add to them."""

DERIVED = ("_flat_weights", "_flat_weight_refs", "_compiled_call_impl")
"""What a module derives from its parameters and its forward, so that a copy makes its own; no public API reports it."""

NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of `nn.Parameter`: operators return plain tensors. What is public is a context only."""


# --- what intercepts operators now -----------------------------------------------------------------------------------


def is_intercepted() -> bool:
    """Whether a transform of `torch.func`, a dispatch mode or a function mode is active; no public API reports it."""
    return bool(
        torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or is_transformed_by_functions()
    )


def is_transformed_by_functions() -> bool:
    """Whether a transform of `torch.func` runs; no public API reports it."""
    return functorch.peek_interpreter_stack() is not None


def runs_function_modes() -> bool:
    """Whether a `TorchFunctionMode` runs; no public API reports it."""
    return bool(torch._C._len_torch_function_stack())


def saves_by_hooks() -> bool:
    """Whether hooks on saved tensors are set; `torch.autograd.graph.saved_tensors_hooks` only sets them."""
    return bool(torch._C._autograd._top_saved_tensors_default_hooks(True))


def runs_backward() -> bool:
    """Whether backward runs on this thread, as in the recomputation of a checkpoint; no public API reports it."""
    return torch._C._current_graph_task_id() != -1


def below_autograd() -> AbstractContextManager[None]:
    """Run operators without gradients and tangents; `torch.no_grad` keeps the tangents of forward mode."""
    return torch._C._AutoDispatchBelowAutograd()


def without_dispatch_modes() -> AbstractContextManager[None]:
    """Run operators that dispatch modes do not see; public modes can only be left by whoever entered them."""
    return torch._C._DisableTorchDispatch()


@contextmanager
def below_transform(*tensors: Tensor) -> Iterator[list[tuple[Tensor, int | None]]]:
    """Run the block below the innermost transform of `torch.func`; `torch.library` has a rule for `vmap` only.

    Yields:
        The tensors that the transform wraps, each with the dimension that `vmap` maps over.
    """
    interpreter: Any = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    if interpreter.key() == functorch.TransformType.Vmap:
        unwrapped = [functorch._unwrap_batched(tensor, level) for tensor in tensors]
    else:
        unwrapped = [(functorch._unwrap_for_grad(tensor, level), None) for tensor in tensors]
    with interpreter.lower():
        yield unwrapped


def has_global_hooks() -> bool:
    """Whether the user registered hooks for all modules; no public API reports it."""
    hooks = [hook for registry in GLOBAL_HOOKS for hook in [*registry.values()]]  # other threads may add some
    return not all(str(getattr(hook, "__module__", "")).startswith("biofx.") for hook in hooks)


# --- operators -------------------------------------------------------------------------------------------------------


def qualified_name(target: Any) -> str | None:
    """Namespace and name of an operator without its overload, or None; `str` does not tell operators from functions."""
    name = getattr(target, "_qualified_op_name", None)
    return None if name is None else str(name)


def schema_of(operator: Any) -> Any:
    """The schema of an operator, or None; `torch.library.infer_schema` reads that of a function only."""
    return getattr(operator, "_schema", None)


def parsed_schema(schema: str) -> Any:
    """The arguments and results in the text of a schema; `torch.library` only defines operators by it."""
    return torch._C.parse_schema(schema)


def call_untraced(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator that a patch of `OpOverload.__call__` does not see; calling it is the only public way."""
    return operator._op(*args, **kwargs)


# --- tensors ---------------------------------------------------------------------------------------------------------


ASKED_OF_LEAVES = ("is_leaf", "grad_fn", "_base", "_is_view")
"""Attributes that distinguish a parameter from a computed tensor. Two are private, and users' code reads them."""

VERSION: Any = Tensor._version.__get__  # type: ignore[attr-defined]
"""The getter of a tensor's version, which shows whether it was written to; only saved tensors have a public one."""


def memory_of(tensor: Tensor) -> int:
    """A key for the memory of a tensor and its views; `data_ptr` is 0 if empty, and ends copies on write."""
    return int(tensor.untyped_storage()._cdata)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory; the zeros of forward-mode gradients have none, and wrappers of `vmap` hide it."""
    return not tensor._is_zerotensor() and not functorch.is_functorch_wrapped_tensor(tensor)


def uses_of_memory(tensor: Tensor) -> int:
    """How many objects refer to the memory of a tensor; no public API reports it."""
    return int(torch._C._storage_Use_Count(memory_of(tensor)))


def copy_on_write(tensor: Tensor) -> Tensor:
    """A copy whose memory moves when one of the two is written to; `clone` copies at once."""
    return tensor._lazy_clone()


def is_copy_on_write(tensor: Tensor) -> bool:
    """Whether the memory of a tensor has not moved yet; no public API reports it."""
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def has_hooks(tensor: Tensor) -> bool:
    """Whether hooks act on the gradient of a tensor; public are only functions that add some."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


# --- modules, graphs, optimizers -------------------------------------------------------------------------------------


def pruned_name(hook: BasePruningMethod) -> str:
    """The name of the parameter that a hook prunes; `torch.nn.utils.prune.is_pruned` tells only that there is one."""
    return hook._tensor_name


def tracer_class(graph: fx.Graph) -> Any:
    """The class of the tracer of a graph; `fx.Graph` only takes it."""
    return graph._tracer_cls


def empty_like(graph: fx.Graph) -> fx.Graph:
    """A graph without nodes whose tracer and code generation are those of another; `fx.Graph` only takes them."""
    result = fx.Graph(tracer_cls=tracer_class(graph))
    result.set_codegen(graph._codegen)
    return result


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Whether steps of an optimizer run hooks; `register_step_pre_hook` succeeds where they do not."""
    return getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_pre_hooks")


def steps_under_way(optimizer: Optimizer) -> int:
    """How many steps of an optimizer run on this thread, one in the other; post hooks do not run if one fails."""
    wrapper, frame, count = type(optimizer).step.__code__, sys._getframe(1), 0
    while frame is not None:
        count += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return count


def run_hooks_next_to_step(optimizer: Optimizer, before: RemovableHandle, after: RemovableHandle) -> None:
    """Make one hook the last before a step, and one the first after it; hooks run in the order of registration."""
    hooks: tuple[Any, Any] = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    hooks[0].move_to_end(before.id)
    hooks[1].move_to_end(after.id, last=False)


# --- compiling and exporting -----------------------------------------------------------------------------------------


def wrapper_under_way() -> DistributedDataParallel | None:
    """The data-parallel wrapper whose forward runs; no public API gives it to the model inside."""
    return DistributedDataParallel._active_ddp_module


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Allow this many compiled variants of a function; `torch.compile` takes a limit only since PyTorch 2.12."""
    config: Any = importlib.import_module("torch._dynamo.config")  # takes seconds, and only compiling needs it
    patched: AbstractContextManager[None] = config.patch(recompile_limit=limit)
    return patched


def any_batch_size() -> AbstractContextManager[None]:
    """Make `torch.export` treat lengths of 0 and 1 like any others; `Dim.AUTO` specializes them."""
    return shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined, no-any-return]


@contextmanager
def fast_export() -> Iterator[None]:
    """Make `torch.export` faster: leave out what biofx does not need. The graph stays the same.

    Its cache of fake results compares sizes, which takes longer than computing them if sizes are symbols. Also, each
    node gets the place in the source that created it.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    before = getattr(fx_config, "do_not_emit_stack_traces", False)  # not every version has it
    fx_config.do_not_emit_stack_traces = True
    try:
        with config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def guards_of(program: torch.export.ExportedProgram) -> list[str]:
    """The assumptions about shapes under which a graph is correct; `range_constraints` has only those of one length."""
    return list(program._guards_code)
