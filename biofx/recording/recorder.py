"""The recorder: notes the dispatcher operators that run while it is active.

The model runs, so loops, caches, scripted modules, custom autograd functions and hooks are recorded like anything else:
by the operators that they call.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from biofx.base.contents import tensors_in
from biofx.base.generators import seed_global
from biofx.base.isolation import parameters_kept, tensors_in_attributes, undisturbed
from biofx.base.torch_internals import (
    HigherOrderOperator,
    StorageWeakRef,
    TorchDispatchMode,
    WeakTensorKeyDictionary,
    has_memory,
    memory_of,
    pytree,
    schema_of,
)
from biofx.model.synapses import stored_parameters
from biofx.recording.call_sites import place_in_source, short_name
from biofx.recording.catalog import MAKES_CONSTANTS, Kind, decomposed, kind_of, name_of
from biofx.recording.operations import Depends, Operation, Recording, Value, depends_of
from biofx.recording.questions import Questions
from biofx.recording.trees import leaves, mapped

if TYPE_CHECKING:
    from torch import fx

LARGEST_INDEX = 1 << 22  # entries of an integer or boolean tensor that is kept, as operators on layout need its values


class Recorder(TorchDispatchMode):
    """Records operators while it is active, on the thread that entered it.

    Args:
        most: the number of operators at which it stops the run by an error, or None for any number.

    Attributes:
        recording: what was recorded so far.
        node: the node of a captured graph that runs now.
        called: the functions of PyTorch that run now.
        failed: the function that failed first, and its module.
        handed_out: whether Python or NumPy was handed activity, so that tensors made there may depend on it.
    """

    supports_higher_order_operators = True

    def __init__(self, most: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = most
        self.recording = Recording()
        self.node: fx.Node | None = None
        self.failed = ""
        self.handed_out = False
        self._paths: dict[int, str] = {}
        self._running: list[str] = []
        self.called: list[str] = []
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._places: dict[tuple[int, int, torch.Size, tuple[int, ...]], tuple[StorageWeakRef, Value]] = {}
        self._count = 0
        self._listed: dict[Value, nn.Parameter] = {}  # what `parameters()` gave to Python
        self._kept: list[Tensor] = []  # what is known by name stays alive, so that no other tensor takes its address

    # --- what is known before the run ----------------------------------------------------------------------------

    def declare(self, tensor: Tensor, kind: str, name: str) -> Value:
        """Register a tensor under a kind and a name. A weight computed from synapses counts as the parameter."""
        value = self._new(tensor, kind, name)
        if kind == "parameter":
            value.depends = Depends.PARAMETERS
            self.recording.parameters[name] = value
        elif kind == "input":
            value.depends = Depends.INPUTS
            self.recording.inputs.append(value)
        elif kind == "unknown":
            value.depends = Depends.INPUTS
        else:
            value.negative = _has_negative(tensor)
        self._kept.append(tensor)
        return value

    def declare_model(self, model: nn.Module) -> None:
        """Register the parameters, buffers and other tensors of a model."""
        for path, module in model.named_modules():
            self._paths.setdefault(id(module), path)
        for name, parameter in stored_parameters(model):
            self.declare(parameter, "parameter", name)
        for name, buffer in model.named_buffers():
            self.declare(buffer, "buffer", name)
        for name, tensor in tensors_in_attributes(model):
            if tensor not in self._values:
                self.declare(tensor, "constant", name)

    def declare_inputs(self, named: Mapping[str, Any]) -> None:
        """Register the tensors in some arguments as inputs, unless the model itself made them in an earlier call."""
        for name, argument in named.items():
            tensors = tensors_in(argument)
            for index, tensor in enumerate(tensors):
                known = self._known(tensor)
                if known is None or (known.kind in ("unknown", "result") and not known.is_inside):
                    self.declare(tensor, "input", f"{name}[{index}]" if len(tensors) > 1 else name)

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor. One that nothing of the run made starts as unknown."""
        found = self._known(tensor)
        if found is not None:
            return found
        self.recording.strangers.add(id(tensor))
        self.recording.strange_memory.add(_place_in_memory(tensor)[0])
        return self.declare(tensor, "unknown", "")

    def list_parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """Another tensor for a parameter that Python gets from `parameters()`, so that its readers there are known."""
        value = self._known(parameter)
        if value is None or value.kind != "parameter":
            return parameter
        with unrecorded():
            other = nn.Parameter(parameter.detach(), parameter.requires_grad)
        self._values[other] = value
        self._listed[value] = parameter
        self._kept.append(other)
        return other

    def know_as(self, tensor: Tensor, other: Tensor) -> None:
        """Register a tensor that takes the place of another one, such as a parameter."""
        self._values[other] = self.value(tensor)

    def _note_listed(self, tensors: Iterable[Tensor], operation: Operation) -> None:
        for tensor in tensors:
            value = self._known(tensor)
            if value in self._listed and tensor is not self._listed[value]:
                self.recording.listed.setdefault(value.name, operation)

    def _known(self, tensor: Tensor) -> Value | None:
        value: Value | None = self._values.get(tensor)
        if value is None:
            # The same entries of the same memory, as of `.detach()`; unless it was freed, and holds another tensor now.
            reference, value = self._places.get(_place_in_memory(tensor), (None, None))
            if reference is None or reference.expired():
                return None
        return value

    def _new(self, tensor: Tensor, kind: str, name: str = "") -> Value:
        stride = tuple(tensor.stride()) if tensor.layout is torch.strided and not tensor.is_nested else ()
        shape = torch.Size(()) if tensor.is_nested else tensor.shape
        value = Value(self._count, shape, stride, tensor.dtype, kind, name)
        self._count += 1
        self._values[tensor] = value
        place = _place_in_memory(tensor)
        if place[0]:
            self._places[place] = StorageWeakRef(tensor.untyped_storage()), value
        is_own = type(tensor) in (Tensor, nn.Parameter) and has_memory(tensor)
        if not value.is_activity and is_own and tensor.numel() <= LARGEST_INDEX:
            value.data = None if tensor.is_meta else tensor.detach().to("cpu", copy=True)
        return value

    def has_unused(self) -> bool:
        """Whether a parameter with more than one axis was not read."""
        used = {value for operation in self.recording.operations for value in operation.operands}
        return any(v not in used and len(v.shape) > 1 for v in self.recording.parameters.values())

    # --- the run -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note it."""
        kwargs = kwargs or {}
        if _paused.get():
            return func(*args, **kwargs)
        if self._most is not None and len(self.recording.operations) >= self._most:
            raise RuntimeError(f"the run has more than {self._most} operators")
        decomposition = decomposed(func)
        if decomposition is not None:
            with self:
                return decomposition(*args, **kwargs)
        recorded = mapped(Tensor, self.value, (tuple(args), kwargs))
        args, kwargs = self.intercept(func, args, kwargs)
        calls_functions = isinstance(func, HigherOrderOperator) and name_of(func) not in _MAPS_ENTRIES
        if calls_functions:
            args, kwargs = pytree.tree_map_only(Callable, self._recorded, (args, kwargs))  # type: ignore[call-overload]
        result = self.execute(func, args, kwargs, recorded[0])
        operation = self._operation(func, *recorded)
        if self._listed:
            self._note_listed(leaves(Tensor, (args, kwargs)), operation)
        depends = operation.depends
        if (operation.name == "_local_scalar_dense" or operation.name in _CHOOSES) and depends is Depends.INPUTS:
            self.recording.decisions.append(operation)
        returned = list(leaves(Tensor, result))
        if calls_functions and all(self._known(tensor) for tensor in returned):  # by operators in these functions
            return result
        source = next(leaves(Tensor, args), None)
        operation.outputs = tuple(self._returned(tensor, operation, depends, source) for tensor in returned)
        for value in operation.written:
            self._note_write(value, operation, depends)
        self.recording.operations.append(operation)
        if self.node is not None:
            self.recording.operations_of.setdefault(self.node, []).append(operation)
        return result

    def _operation(self, func: Any, args: Any, kwargs: Any) -> Operation:
        """The call of an operator, before it is known what it returns.

        Args:
            func: the operator.
            args: its positional arguments, with values in the place of tensors.
            kwargs: its other arguments, in the same way.
        """
        operands = tuple(leaves(Value, (args, kwargs)))
        name = name_of(func)
        if (
            name == "lift_fresh"
            and operands[0].kind == "unknown"
            # A single number was noted as a decision; an array may have been computed from activity.
            and not (self.handed_out and operands[0].is_activity and operands[0].shape.numel() > 1)
        ):  # `torch.tensor` of numbers of Python
            operands[0].kind, operands[0].depends = "constant", Depends.NOTHING
        depends = max(map(depends_of, operands), default=Depends.NOTHING)
        return Operation(
            operator=func,
            name=name,
            kind=kind_of(func),
            args=args,
            kwargs=kwargs,
            outputs=(),
            called=self.called[-1] if self.called else name,
            path=self._running[-1] if self._running else "",
            place=place_in_source(),
            node=self.node,
            operands=operands,
            written=tuple(_written(func, args, kwargs)),
            depends=Depends.NOTHING if name in MAKES_CONSTANTS else depends,
        )

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that an operator calls, such as a branch of `cond`, with what it does recorded."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with _CalledFunctions(self), self:
                return function(*args, **kwargs)

        return call

    def intercept(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with which an operator runs; a subclass may give it others."""
        return args, kwargs

    def execute(self, func: Any, args: Any, kwargs: Any, values: Any) -> Any:
        """Run an operator.

        Args:
            func: the operator.
            args: its positional arguments.
            kwargs: its other arguments.
            values: the positional arguments with values in the place of tensors.
        """
        return func(*args, **kwargs)

    def _returned(self, tensor: Tensor, operation: Operation, depends: Depends, source: Tensor | None) -> Value:
        value: Value | None = self._values.get(tensor)
        if value is not None and value in operation.operands and _has_form(value, tensor):  # changed, or as it was
            if not value.is_activity and value.data is not None:
                value.data = None if tensor.is_meta else tensor.detach().to("cpu", copy=True)
            value.negative = depends is Depends.NOTHING and _has_negative(tensor)
            return value
        value = self._new(tensor, "result")
        value.producer = operation
        value.depends = depends
        value.is_inside = bool(self._running) or any(operand.is_inside for operand in operation.operands)
        is_view = _returns_view(operation.operator) and not _is_copy(tensor, source)
        if is_view or (operation.kind is Kind.LAYOUT and operation.written):
            operation.written = ()  # transpose_ and the like do not change the entries
            value.view_of = operation.operands[0]
            value.depends = depends_of(operation.operands[0])
        if depends is Depends.NOTHING or (depends is Depends.PARAMETERS and tensor.numel() == 1):
            value.negative = _has_negative(tensor)
        return value

    def _note_write(self, value: Value, operation: Operation, depends: Depends) -> None:
        """What is written into a view is in the memory of all values below it."""
        while True:
            value.depends = max(value.depends, depends)
            if value.kind == "parameter":
                self.recording.changed.setdefault(value.name, operation)
            if value.view_of is None:
                return
            value = value.view_of

    @property
    def described(self) -> str:
        """The function that runs, and the module in which."""
        path = self._running[-1] if self._running else ""
        return f"{self.called[-1]} in {path}" if path else self.called[-1]

    def note_handed_out(self, tensor: Tensor) -> None:
        """Note that Python or NumPy gets the numbers of a tensor."""
        value = self.value(tensor)
        self.handed_out |= value.is_activity and depends_of(value) is Depends.INPUTS

    # --- captured graphs -----------------------------------------------------------------------------------------

    def enter_node(self, node: fx.Node) -> None:
        """Note which node of a captured graph runs from here on, and so which module."""
        stack = node.meta.get("nn_module_stack", {})
        self.node = node
        self._running[-1] = next((path for path, _ in reversed(stack.values())), "")

    def note_node(self, node: fx.Node, result: Any) -> None:
        """Note what a node returned."""
        known = mapped(Tensor, self.value, result)
        self.recording.nodes[node] = known

    def leave_graph(self) -> None:
        """Note that the graph has run."""
        self.node = None

    # --- surroundings --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Track which modules and functions run, and the arguments and results of the model."""
        thread = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                if not self._running and module is not model:
                    self.declare_inputs({f"input {i}": argument for i, argument in enumerate(args)})
                self._running.append(self._paths.get(id(module), type(module).__name__))

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if threading.get_ident() == thread and self._running:
                self._running.pop()
                if module is model:
                    self.recording.outputs += map(self.value, tensors_in(result))

        def name_inputs(module: nn.Module, args: Any, kwargs: Any) -> None:
            # `enter` has pushed the model already: this is the outermost call, not one inside it.
            if threading.get_ident() == thread and len(self._running) == 1:
                if self.recording.first_call is None:
                    self.recording.first_call = args, kwargs
                self.declare_inputs(bound(module, args, kwargs))

        questions = Questions(model, lambda name, _: self.recording.asked.add(name))
        handles = [
            # A scripted module hides this method, but runs such hooks.
            nn.Module.register_forward_pre_hook(model, name_inputs, with_kwargs=True, prepend=True),
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with _CalledFunctions(self), _listing(model, self), questions:
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Registry(dict[str, Any]):
    """The parameters of a module, which notifies a recorder when Python iterates over them."""

    def __init__(self, parameters: dict[str, Any], recorder: Recorder) -> None:
        super().__init__(parameters)
        self._recorder = recorder

    def items(self) -> Any:
        """The parameters by name."""
        return [(n, p if p is None else self._recorder.list_parameter(p)) for n, p in super().items()]

    def values(self) -> Any:
        """The parameters."""
        return [parameter for _, parameter in self.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, such as that of a module which forward copies, is a dictionary, and does not copy the recorder."""
        return dict, (dict(super().items()),)


@contextlib.contextmanager
def _listing(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Detect parameters that forward takes from `parameters()`, which yields the stored tensors of synapses."""
    own = [(vars(m), m._parameters) for m in model.modules() if type(vars(m).get("_parameters")) is dict]
    for attributes, parameters in own:
        attributes["_parameters"] = _Registry(parameters, recorder)
    try:
        yield
    finally:
        for attributes, parameters in own:
            now = dict(dict.items(attributes["_parameters"]))  # forward may have replaced some
            parameters.clear()
            parameters.update(now)
            attributes["_parameters"] = parameters


class _CalledFunctions(TorchFunctionMode):
    """Notes which function of PyTorch is called, before it becomes several operators."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = short_name(func)
        called = self._recorder.called
        called.append(name)
        if name in _HANDS_OUT:
            self._recorder.note_handed_out(args[0])
        try:
            with _without(torch.backends.mkldnn) if name in _RECURRENT else contextlib.nullcontext():
                return func(*args, **(kwargs or {}))
        except Exception:  # whatever it is, it goes on, and the recorder tells where
            self._recorder.failed = self._recorder.failed or self._recorder.described
            raise
        finally:
            called.pop()


@contextlib.contextmanager
def _without(library: Any) -> Iterator[None]:
    """Turn off oneDNN or cuDNN, which run a layer in one piece; `flags` would set other things, too, and warn."""
    enabled, library.enabled = library.enabled, False
    try:
        yield
    finally:
        library.enabled = enabled


_CHOOSES = frozenset(("cond", "while_loop"))
_MAPS_ENTRIES = frozenset(("flex_attention",))  # calls a function on single numbers
_HANDS_OUT = frozenset(("numpy", "array", "tolist", "dlpack"))
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))


# --- running a model ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording_of(
    recorder: Recorder, model: nn.Module, *, training: bool = False, but: Collection[nn.Parameter] = ()
) -> Iterator[None]:
    """Record what runs in the block, and undo its side effects on a model, except for parameters that are to change."""
    memory = {name: _place_in_memory(p.data) for name, p in stored_parameters(model)}
    with contextlib.ExitStack() as stack:
        for context in (parameters_kept(model, but), undisturbed(model), torch.no_grad(), _operator_by_operator()):
            stack.enter_context(context)
        model.train(training)
        seed_global()  # forward may draw which layers it runs
        recorder.declare_model(model)
        try:
            with recorder.watching(model), recorder:
                yield
        finally:
            for name, parameter in stored_parameters(model):
                if name in memory and _place_in_memory(parameter.data) != memory[name]:
                    recorder.recording.changed.setdefault(name, None)


_paused: ContextVar[bool] = ContextVar("_paused", default=False)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Keep operators out of recordings that are not part of a forward, such as those that check what it does."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


@contextlib.contextmanager
def _operator_by_operator() -> Iterator[None]:
    """Turn off what runs a layer in one piece."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _without(torch.backends.cudnn), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by the name of its parameter."""
    try:
        arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{str(index): argument for index, argument in enumerate(args)}, **kwargs}
    for name, value in list(arguments.items()):
        parameter = inspect.signature(module.forward).parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            del arguments[name]
            arguments |= {f"{name}[{index}]": item for index, item in enumerate(value)}
    return arguments


# --- tensors -----------------------------------------------------------------------------------------------------


def _has_form(value: Value, tensor: Tensor) -> bool:
    """Whether a tensor still has the shape and strides of its value."""
    return value.shape == tensor.shape and (not value.stride or value.stride == tensor.stride())


def _has_negative(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not _is_plain(tensor):
        return False
    return bool((tensor.detach() < 0).any())


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a strided tensor of PyTorch's own class."""
    is_own = type(tensor) in (Tensor, nn.Parameter)
    return is_own and not tensor.is_nested and tensor.layout is torch.strided and has_memory(tensor)


def _place_in_memory(tensor: Tensor) -> tuple[int, int, torch.Size, tuple[int, ...]]:
    """Where a tensor lies; the storage is 0 if there is none that identifies it."""
    if not _is_plain(tensor):
        return 0, 0, torch.Size(()), ()
    return memory_of(tensor), int(tensor.storage_offset()), tensor.shape, tensor.stride()


@cache
def _aliases(operator: Any) -> tuple[tuple[tuple[str, int], ...], bool]:
    """The arguments that an operator writes to, by name and position, and whether it returns a view."""
    schema = schema_of(operator)
    if schema is None:
        return (), False
    written = [
        (a.name, i) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return tuple(written), views


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Value]:
    for name, position in _aliases(operator)[0]:
        argument = args[position] if position < len(args) else kwargs.get(name)
        yield from leaves(Value, argument)


def _is_copy(tensor: Tensor, source: Tensor | None) -> bool:
    """Whether an operator that may return a view, such as `to`, has copied."""
    if source is None:
        return False
    places = _place_in_memory(tensor)[0], _place_in_memory(source)[0]
    return all(places) and places[0] != places[1]


def _returns_view(operator: Any) -> bool:
    return _aliases(operator)[1]
