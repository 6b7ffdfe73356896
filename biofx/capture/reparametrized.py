"""Reparametrized weights: a hook or a parametrization computes them from learned parameters.

`torch.nn.utils.prune` and the older `torch.nn.utils.weight_norm` compute a weight in a forward pre-hook of its module;
`torch.nn.utils.parametrize` computes it in a property. Both are traced, so the learned parameters become nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from biofx.base.torch_internals import SpectralNorm, WeightNorm, WeightNormParametrization, pruned_name

TRACEABLE_HOOKS: tuple[type, ...] = (prune.BasePruningMethod, WeightNorm)
COMPUTING_HOOKS: tuple[type, ...] = (*TRACEABLE_HOOKS, SpectralNorm)
TRACED_MODULES: tuple[type[nn.Module], ...] = (parametrize.ParametrizationList, WeightNormParametrization)


def unparametrized_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without the subclass that `torch.nn.utils.parametrize` generates."""
    cls = type(module)
    return cls.__mro__[1] if parametrize.is_parametrized(module) else cls


def is_learned(module: nn.Module, name: str) -> bool:
    """Whether a module itself has a parameter, or the parameters from which it is computed."""
    names = (name, f"{name}_orig", f"{name}_v")  # of prune and of the older weight norm
    is_own = any(isinstance(module._parameters.get(own), nn.Parameter) for own in names)
    return is_own or parametrize.is_parametrized(module, name)


def has_untraceable_hooks(module: nn.Module, registries: tuple[str, ...]) -> bool:
    """Whether a module has hooks other than the traceable ones that compute a weight."""
    hooks = [hook for registry in registries for hook in getattr(module, registry).values()]
    return not all(isinstance(hook, TRACEABLE_HOOKS) for hook in hooks)


def with_computing_hooks(root: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward of the root module that first runs its hooks that compute a weight; a tracer skips them."""
    hooks = [hook for hook in root._forward_pre_hooks.values() if isinstance(hook, TRACEABLE_HOOKS)]
    if not hooks:
        return forward

    def run(module: nn.Module, *args: Any) -> Any:
        for hook in hooks:
            hook(module, args)
        return forward(module, *args)

    return run


def pop_computing_hooks(root: nn.Module, kinds: tuple[type, ...] = COMPUTING_HOOKS) -> dict[int, Any]:
    """Remove and return the hooks of a root module that compute a weight; its graph or its forward takes over."""
    hooks = root._forward_pre_hooks
    return {key: hooks.pop(key) for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]}


def detach_computed_attributes(model: nn.Module) -> None:
    """Detach the weights that hooks computed and left as attributes: only leaf tensors can be deep-copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def computed_names(model: nn.Module) -> set[tuple[str, str]]:
    """The attributes that hooks compute before every forward, each as (path of the module, name)."""
    return {
        (path, pruned_name(hook) if isinstance(hook, prune.BasePruningMethod) else hook.name)
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod | WeightNorm | SpectralNorm)
    }
