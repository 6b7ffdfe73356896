"""Reparametrized weights: those that a hook or a parametrization computes from what is learned.

`torch.nn.utils.prune` and the older `torch.nn.utils.weight_norm` compute a weight in a hook of its module, before
forward; `torch.nn.utils.parametrize` in a property. Both are traced, so that what is learned becomes a node of the
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

TRACEABLE_HOOKS: tuple[type, ...] = (prune.BasePruningMethod, WeightNorm)
COMPUTING_HOOKS: tuple[type, ...] = (*TRACEABLE_HOOKS, SpectralNorm)
TRACED_THROUGH: tuple[type[nn.Module], ...] = (parametrize.ParametrizationList, parametrizations._WeightNorm)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the one that `torch.nn.utils.parametrize` put in front of it."""
    cls = type(module)
    return cls.__mro__[1] if parametrize.is_parametrized(module) else cls


def is_learned(module: nn.Module, name: str) -> bool:
    """Whether a parameter, or what it is computed from, is learned by a module of its own."""
    names = (name, f"{name}_orig", f"{name}_v")  # of prune and of the older weight norm
    is_own = any(isinstance(module._parameters.get(own), nn.Parameter) for own in names)
    return is_own or parametrize.is_parametrized(module, name)


def has_other_hooks(module: nn.Module, registries: tuple[str, ...]) -> bool:
    """Whether a module has hooks beside those that compute a weight, and can be traced."""
    hooks = [hook for registry in registries for hook in getattr(module, registry).values()]
    return not all(isinstance(hook, TRACEABLE_HOOKS) for hook in hooks)


def with_computing_hooks(root: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of a root module, behind those of its hooks that compute a weight: they run when a module is called."""
    hooks = [hook for hook in root._forward_pre_hooks.values() if isinstance(hook, TRACEABLE_HOOKS)]
    if not hooks:
        return forward

    def run(module: nn.Module, *args: Any) -> Any:
        for hook in hooks:
            hook(module, args)
        return forward(module, *args)

    return run


def taken_hooks(root: nn.Module, kinds: tuple[type, ...] = COMPUTING_HOOKS) -> dict[int, Any]:
    """Take the hooks that compute a weight from a root module: its graph computes it, or runs them."""
    hooks = root._forward_pre_hooks
    return {key: hooks.pop(key) for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]}


def detach_computed_attributes(model: nn.Module) -> None:
    """Take from the autograd graph what hooks computed and left as attributes, so that the model can be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def computed_names(model: nn.Module) -> set[tuple[str, str]]:
    """The attributes that hooks compute anew before every forward: path of the module, name."""
    return {
        (path, hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name)
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod | WeightNorm | SpectralNorm)
    }
