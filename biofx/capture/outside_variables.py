"""Outside variables: state outside of modules that their Python reads, such as a training schedule.

These are the global variables, the variables of enclosing functions and the attributes of classes that the code of
methods names, and what is reached from there: containers, functions with their code and defaults, and the named
attributes of the user's objects, classes and Python modules.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.base.contents import ATOMS, NAMESPACES, is_array, items_of, put_back, slots_of
from biofx.base.generators import is_generator, set_state, state_of
from biofx.base.rule_code import codes_in, globals_in, names_in
from biofx.base.torch_internals import DERIVED
from biofx.capture.variable_keys import CONTAINERS, KEYED, PLAIN, Opaque, key_of, wrapped_in
from biofx.model.islands import ORIGINAL_CLASS, PRESENT_FORWARD
from biofx.model.provenance import RECORD

_MISSING = object()
_MOST = 50_000  # values that are followed

# Most variables that forwards refer to belong to these packages, and nobody sets them between two calls.
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "biofx"} - {"__main__"})
_OF_THE_SYSTEM = frozenset(("SystemRandom", "secrets", "urandom", "getrandom", "uuid4"))  # without a state
_OF_GRAPH_MODULES = frozenset(
    {*vars(fx.GraphModule(nn.Module(), fx.Graph())), *DERIVED, RECORD}
)  # attributes of modules
_LOOK_UP = frozenset(("globals", "vars", "eval", "exec", "modules", "import_module", "__globals__", "__dict__"))
_SETTINGS: dict[str, Callable[[], Any]] = {  # of PyTorch, by names in code
    **{
        name: getattr(torch, name)
        for name in ("get_default_dtype", "get_default_device", "are_deterministic_algorithms_enabled",
                     "is_deterministic_algorithms_warn_only_enabled", "get_deterministic_debug_mode", "get_num_threads",
                     "get_num_interop_threads", "get_float32_matmul_precision", "is_anomaly_enabled", "initial_seed")
    },
    "enabled": lambda: (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled),
    "benchmark": lambda: torch.backends.cudnn.benchmark,
    "deterministic": lambda: torch.backends.cudnn.deterministic,
}  # fmt: skip
_ALWAYS_READ = "get_default_dtype"  # by what creates tensors
_COMPARISONS = frozenset(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "hash"))
_NOT_IN_FORWARD = frozenset(
    f"__{name}__"
    for name in ("init", "new", "post_init", "init_subclass", "repr", "str", "del", "copy", "deepcopy",
                 "reduce", "reduce_ex", "getstate", "setstate", "set_name")
)  # fmt: skip


class OutsideVariables:
    """The variables that modules read, with their present values.

    Args:
        modules: the modules, by their paths.
        but: attributes of modules to ignore, because forward itself assigns them: paths and names.
        followed: names of tensors whose present values are always read, by id: writes do not change these variables.

    Attributes:
        keys: what is compared, by the names of variables; equal in copies and in other processes.
        met: the tensors of `followed` that variables hold, with their names in it, by the names of the variables.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        but: frozenset[tuple[str, str]] = frozenset(),
        followed: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._modules, self._but, self._packages = dict(modules), but, _packages_of(modules.values())
        self._followed = followed
        self._types = [(module, type(module)) for module in self._modules.values()]
        names = frozenset({"forward"})
        while True:  # the code that is reached names attributes, in which more code is found
            self._begin(names)
            more = names.union(*(_names_in(function.__code__) for function in self._functions))
            if more == names:
                return
            names = more

    def is_same(self) -> bool:
        """Whether each variable has the very same value as before, with the same contents; a fast test."""
        try:
            return (
                all(type(module) is cls for module, cls in self._types)
                and all(where.get(key, _MISSING) is value for where, key, value in self._lookups)
                and all(_SETTINGS[name]() == value for name, value in self._settings.items())
                and all(where.keys() == names for _, where, names in self._present.values())
                and all(_attribute(where, key) is value for where, key, value in self._attributes)
                and all(list(now) == before if isinstance(now, deque) else now == before for now, before in self._held)
                and all([*now] == keys for now, keys in self._orders)
                and all(_bytes(array) == _bytes(before) for array, before in self._arrays)
            )
        except Exception:  # noqa: BLE001 - a changed tensor or array has no truth value, and other objects may raise
            return False

    @property
    def note(self) -> str | None:
        """A note for the user on variables that were not followed; None if all were."""
        if len(self.keys) < _MOST:
            return None
        return (
            f"forward reaches more than {_MOST:,} variables outside of the model; changes of the others are not noticed"
        )

    def effect(self) -> tuple[str, str] | None:
        """A variable that forward changed since, and what it did in words; None if there is none."""
        random = self.random()
        if random is not None:
            return random, f"draws random numbers from {random}"
        if self.is_same():
            return None
        changed = first_difference(self.keys, OutsideVariables(self._modules, self._but).keys)
        return None if changed is None else (changed, f"changes {changed}, which is not part of the model")

    def random(self) -> str | None:
        """A random number generator that was used since, or one of the system that code names; None if none was."""
        drawn = (name for name, generator, state in self._generators if state_of(generator) != state)
        return next(drawn, None) or next(iter(self._names & _OF_THE_SYSTEM), None)

    @property
    def names(self) -> frozenset[str]:
        """All names in the code that is reached, and the texts that may be names, as for `getattr`."""
        return self._names

    def reads(self, name: str) -> bool:
        """Whether a variable, or a name in code, is among what is read."""
        return name in self.keys or name in self._names

    def restore(self) -> None:
        """Restore contents of containers, attributes, variables, and random number generators."""
        for where, key, value in self._lookups:
            if isinstance(where, dict) and value is not _MISSING and where.get(key, _MISSING) is not value:
                where[key] = value
        for owner, key, value in (*self._of_classes, *self._attributes):
            if not key.startswith("__") and value is not _MISSING and _attribute(owner, key) is not value:
                setattr(owner, key, value)
        for owner, where, names in self._present.values():
            for name in (where.keys() - names) & self._names:
                delattr(owner, name) if isinstance(owner, type) else where.pop(name)
        for holder, content in self._held:
            if not _holds_same(holder, content):
                put_back(holder, content)
        for array, before in self._arrays:
            if _bytes(array) != _bytes(before):
                array[...] = before
        self.restore_generators()

    def restore_generators(self) -> None:
        """Restore random number generators alone."""
        for _, generator, state in self._generators:
            if state_of(generator) != state:
                set_state(generator, state)

    # --- the walk --------------------------------------------------------------------------------------------------

    def _begin(self, names: frozenset[str]) -> None:
        self._names = names
        self._settings = {name: get() for name, get in _SETTINGS.items() if name in {*names, _ALWAYS_READ}}
        self.keys: dict[str, Any] = {f"torch.{name}": str(value) for name, value in self._settings.items()}
        self._functions: list[FunctionType] = []
        self._lookups: list[tuple[Any, str, Any]] = []  # in dictionaries: where, the name, and the value
        self._present: dict[int, tuple[Any, Any, set[str]]] = {}  # the owners of dictionaries, and all names there
        self._of_classes: list[tuple[type, str, Any]] = []  # the same, of classes
        self._attributes: list[tuple[Any, str, Any]] = []  # the same, of objects without a dictionary
        self._held: list[tuple[Any, Any]] = []  # containers, and copies of them
        self._orders: list[tuple[Any, list[Any]]] = []  # dictionaries, and their keys, whose order equality ignores
        self._arrays: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.met: dict[str, tuple[str, Tensor]] = {}
        self._generators: list[tuple[str, Any, Any]] = []
        self._seen: dict[int, Any] = {}
        for cls in dict.fromkeys(map(type, self._modules.values())):  # the guard compares the classes themselves
            self._walk(self._of_class(cls))
        for path, module in self._modules.items():
            if self._classes(type(module)):
                for name, value in attributes_of(module):
                    if name in names and (path, name) not in self._but and type(value) not in ATOMS:
                        self._walk([(f"{path}.{name}".lstrip("."), value)])

    def _follows(self, module: Any) -> bool:
        """Whether the code of a Python module is followed: a script, a project, or the package of a model."""
        package = _package(module)
        return package not in _NOT_OF_USERS and (package in self._packages or not _is_installed(package))

    def _names_of_class(self, cls: type) -> set[str]:
        """The names that a class or one of the followed classes that it inherits from gives to its instances."""
        return {name for each in self._classes(cls) for name in vars(each)}

    def _classes(self, cls: type) -> list[type]:
        """The followed classes that a class inherits from, without those that biofx generates."""
        return [each for each in cls.__mro__ if self._follows(each.__module__) and not _is_generated(each)]

    def _key(self, value: Any) -> Any:
        """The key of a value. Of an object that is followed, it is the class: its attributes have their own keys."""
        if id(value) in self._followed:
            return self._followed[id(value)]
        is_object = not isinstance(value, (*KEYED, *CONTAINERS, nn.Module))
        is_followed = is_object and (type(value) in NAMESPACES or self._follows(type(value).__module__))
        return type(value).__qualname__ if is_followed else key_of(value)

    def _walk(self, values: Iterable[tuple[str, Any]]) -> None:
        """Note values and all that is reached from them."""
        pending = [*values]
        while pending and len(self.keys) < _MOST:
            name, each = pending.pop()
            try:
                self.keys[name] = self._key(each)
                if id(each) in self._followed:
                    self.met[name] = self._followed[id(each)], each
                if type(each) not in PLAIN and id(each) not in self._seen:
                    self._seen[id(each)] = each  # kept alive, so that its id stays unique
                    pending += self._parts(name, each)
            except Exception:  # noqa: BLE001 - an object may refuse inspection
                self.keys[name] = Opaque(each)

    def _parts(self, label: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Tensor):
            if id(value) not in self._followed:
                self.tensors.append(value)
        elif isinstance(value, FunctionType):
            yield from self._of_function(label, value)
        elif is_generator(value):
            self._generators.append((label, value, state_of(value)))
        elif is_array(value):
            self._arrays.append((value, value.copy()))
        elif isinstance(value, ModuleType):
            if self._follows(value.__name__):
                yield from self._look_up(
                    value.__name__, vars(value), (self._names | {"__getattr__"}) & vars(value).keys()
                )
        elif isinstance(value, type):
            yield from self._of_class(value)
        elif not isinstance(value, nn.Module):
            yield from wrapped_in(label, value)
            yield from self._of_container(label, value)
            yield from self._of_object(label, value)

    def _of_function(self, label: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
        if not self._follows(function.__globals__.get("__name__")):
            return
        self._functions.append(function)
        place = function.__globals__.get("__name__", "")
        named = _globals_in(function.__code__) & function.__globals__.keys()
        yield from self._look_up(place, function.__globals__, named)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":  # of `super()`
                yield from self._attribute_of(f"{place}.{name}", cell, "cell_contents")
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            yield from self._attribute_of(f"{label}.{name}", function, name)
        yield from self._look_up(label, vars(function), self._names & vars(function).keys())

    def _of_class(self, cls: type) -> Iterator[tuple[str, Any]]:
        if self._follows(type(cls).__module__):  # its metaclass
            yield _label(type(cls)), type(cls)
        hidden: set[str] = set()  # by classes that come first, unless code asks for the next
        for each in self._classes(cls):
            # Operators and calls run special methods that no code names.
            special = {name for name, value in vars(each).items() if _is_special(name, value)}
            names = (self._names & self._names_of_class(cls) | special) - hidden
            self._of_classes += [(each, name, each.__dict__.get(name, _MISSING)) for name in names - special]
            yield from self._look_up(_label(each), each.__dict__, names, each)
            if "super" not in self._names:
                hidden |= vars(each).keys()

    def _of_container(self, label: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, CONTAINERS):
            return
        if isinstance(value, (dict, list, set, deque)):
            kind = dict if isinstance(value, dict) else set if isinstance(value, set) else list
            self._held.append((value, kind(items_of(value))))
        if isinstance(value, dict):
            self._orders.append((value, [*value]))
        is_mapping = isinstance(value, (dict, MappingProxyType))
        for place, each in enumerate(items_of(value)):
            key, item = each if is_mapping else (place, each)
            if type(item) not in PLAIN:
                shown = key if isinstance(key, PLAIN) else place
                yield f"{label}[{shown!r}]", item

    def _of_object(self, label: str, value: Any) -> Iterator[tuple[str, Any]]:
        cls = type(value)
        if not (type(value) in NAMESPACES or self._follows(cls.__module__)):
            return
        yield _label(cls), cls
        if hasattr(value, "__dict__"):
            yield from self._look_up(label, vars(value), self._names & (vars(value).keys() | self._names_of_class(cls)))
        for name in self._names & {*slots_of(cls)}:
            yield from self._attribute_of(f"{label}.{name}", value, name)

    def _look_up(
        self, label: str, where: Mapping[str, Any], names: Iterable[str], owner: type | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Note names of a dictionary, or of a class; also absent ones: once set, they may hide what a class has."""
        self._present.setdefault(id(where), (owner, where, {*where}))
        for name in sorted(names):
            value = where.get(name, _MISSING)
            self._lookups.append((where, name, value))
            if value is not _MISSING:
                yield f"{label}.{name}", value

    def _attribute_of(self, label: str, where: Any, name: str) -> Iterator[tuple[str, Any]]:
        value = _attribute(where, name)
        self._attributes.append((where, name, value))
        yield label, value


def attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that the user's code set on a module."""
    for name, value in vars(module).items():
        if name not in _OF_GRAPH_MODULES and not name.startswith("_biofx"):
            yield name, value


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first name under which keys differ; None if there is none."""
    return next((name for name in {**after, **before} if before.get(name) != after.get(name)), None)


@functools.cache
def _names_in(code: CodeType) -> frozenset[str]:
    """The names in some code, and in the functions that are defined inside it; also those for `getattr`."""
    constants = (each for one in codes_in(code) for each in one.co_consts)
    return frozenset(each for each in constants if isinstance(each, str) and each.isidentifier()).union(names_in(code))


@functools.cache
def _globals_in(code: CodeType) -> frozenset[str]:
    """The global variables in some code. Attributes, as in `self.model`, may be some where code looks variables up."""
    names = _names_in(code)
    return frozenset(globals_in(code)) if names.isdisjoint(_LOOK_UP) else names


def _is_generated(cls: type) -> bool:
    """Whether biofx generated a class: that of an owner of weights, or of a captured model."""
    return ORIGINAL_CLASS in vars(cls) or PRESENT_FORWARD in vars(cls)


def _label(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _attribute(where: Any, name: str) -> Any:
    try:
        return getattr(where, name, _MISSING)
    except ValueError:  # an empty cell
        return _MISSING


def _is_special(name: str, value: Any) -> bool:
    """Whether an attribute of a class is a method that an operator or a call runs, and not a generated comparison."""
    if not name.startswith("__") or name in _NOT_IN_FORWARD or not isinstance(value, FunctionType):
        return False
    return not (name in _COMPARISONS and value.__code__.co_filename.startswith("<"))


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a package was installed, so that it is not the user's script or project."""
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    file = getattr(sys.modules.get(package), "__file__", None)
    return any(str(file).startswith(folder) for folder in folders)


def _packages_of(modules: Iterable[nn.Module]) -> frozenset[str]:
    """The packages that define the classes of modules, except for those of PyTorch and biofx."""
    packages = ([_package(cls.__module__) for cls in type(module).__mro__] for module in modules)
    return frozenset(next((name for name in each if name not in _NOT_OF_USERS), "") for each in packages)


def _holds_same(holder: Any, content: Any) -> bool:
    """Whether a container holds the very same objects in the same order."""
    now, before = ([*items_of(each)] for each in (holder, content))
    if len(now) != len(before):
        return False
    if isinstance(holder, dict):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, before, strict=True))
    if isinstance(holder, set):
        return {*map(id, now)} == {*map(id, before)}
    return all(a is b for a, b in zip(now, before, strict=True))


def _bytes(array: Any) -> bytes:
    return bytes(array.tobytes())
