"""The code of rules, which the caches of torch.compile need to tell one version of a hook from another.

A compiled graph calls a hook by its name, and PyTorch caches compiled graphs on disk by their text. An edited rule
has the same name, so the next process would run the old one. PyTorch has a tag that separates caches.
"""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch.compiler.config as config

_codes: dict[str, str] = {}  # of the hooks that are in models, by the name of their operator
_GLOBAL = frozenset(("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
_others_tag = config.cache_key_tag


def tell_caches(name: str, *functions: Callable[..., Any] | None) -> None:
    """Add the code of a hook to the key of torch.compile's caches.

    Args:
        name: the name of its operator.
        functions: what the operator runs.
    """
    code = digest(functions)
    if _codes.get(name) != code:
        _codes[name] = code
        config.cache_key_tag = f"{_others_tag} biofx:{digest(tuple(sorted(_codes.items())))}".strip()


def digest(value: Any) -> str:
    """A digest of functions: of their code, their constants, and the functions that they name."""
    return hashlib.blake2b(_described(value, set()).encode(), digest_size=16).hexdigest()


def _described(value: Any, seen: set[int]) -> str:
    if isinstance(value, CodeType):
        constants = ", ".join(_described(each, seen) for each in value.co_consts)
        return f"code {value.co_code.hex()} {value.co_names} {value.co_varnames} [{constants}]"
    if isinstance(value, FunctionType) and not str(value.__module__).startswith("torch") and id(value) not in seen:
        seen.add(id(value))
        names = names_in(value.__code__)
        named = [value.__globals__.get(name) for name in names]
        modules = [each for each in named if isinstance(each, ModuleType) and not each.__name__.startswith("torch")]
        named += [getattr(module, name, None) for module in modules for name in names]
        cells = [None if cell == CellType() else cell.cell_contents for cell in value.__closure__ or ()]
        parts = (value.__code__, value.__defaults__, sorted((value.__kwdefaults__ or {}).items()), cells, named)
        return f"function {', '.join(_described(part, seen) for part in parts)}"
    if isinstance(value, tuple | list | frozenset):
        return f"[{', '.join(_described(each, seen) for each in value)}]"
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return repr(value)
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def codes_in(code: CodeType) -> list[CodeType]:
    """A code object, and those of the functions that are defined inside it."""
    return [code, *(each for const in code.co_consts if isinstance(const, CodeType) for each in codes_in(const))]


def names_in(code: CodeType) -> list[str]:
    """The variables and attributes that code names, functions defined inside it included."""
    return [name for each in codes_in(code) for name in each.co_names]


def globals_in(code: CodeType) -> list[str]:
    """The global variables that code names, functions defined inside it included."""
    # `co_names` lists attributes as well; only the instructions distinguish them.
    return [str(each.argval) for one in codes_in(code) for each in dis.get_instructions(one) if each.opname in _GLOBAL]
