"""Reparametrizations of PyTorch: what each makes of the weight that is learned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from biofx.islands import ORIGINAL_HOOKS


@dataclass(frozen=True)
class Effect:
    """What a reparametrization does to a weight.

    Attributes:
        remark: why an entry behind it may have another sign than before it, or an empty string.
        mixes: why no entry behind it stands for one before it, or an empty string.
    """

    remark: str = ""
    mixes: str = ""

    def __add__(self, other: Effect) -> Effect:
        return Effect(self.remark or other.remark, self.mixes or other.mixes)


SCALED = Effect()
DIRECTION = Effect(remark="it is stored as a direction, and its length, which may become negative, apart")
ORTHOGONAL = Effect(mixes="an orthogonal parametrization computes each entry of the weight from all of them")
HOUSEHOLDER = "the householder map of an orthogonal parametrization takes whole numbers from its diagonal"
_LENGTH = "it is the length of a weight, which is stored as a direction apart"


def effect(parametrization: nn.Module) -> Effect | str:
    """What a parametrization does to a weight, or in words why that weight cannot be made of synapses."""
    if isinstance(parametrization, parametrizations._SpectralNorm):
        return SCALED
    if isinstance(parametrization, parametrizations._WeightNorm):
        return DIRECTION
    if isinstance(parametrization, parametrizations._Orthogonal):
        by_entries = parametrization.orthogonal_map is not parametrizations._OrthMaps.householder
        return ORTHOGONAL if by_entries else HOUSEHOLDER
    return f"biofx does not know what {type(parametrization).__name__} makes of it"


def computed(root: nn.Module, path: str, key: str) -> tuple[nn.Module, str, Effect | str] | None:
    """The weight that a parameter is stored for.

    Args:
        root: a module around it.
        path: path of the module in which the parameter is registered.
        key: the parameter's name there.

    Returns:
        The module that has the weight, the weight's name in it, and what is done to the parameter on the way there;
        None if the parameter itself is the weight.
    """
    owner = root.get_submodule(path)
    if isinstance(owner, parametrize.ParametrizationList):
        *above, _, name = path.split(".")
        return root.get_submodule(".".join(above)), name, _effect_of_list(owner, key)
    for hook in [*owner._forward_pre_hooks.values(), *vars(owner).get(ORIGINAL_HOOKS, {}).values()]:
        if isinstance(hook, prune.BasePruningMethod) and key == f"{hook._tensor_name}_orig":
            return owner, hook._tensor_name, SCALED
        if isinstance(hook, SpectralNorm) and key == f"{hook.name}_orig":
            return owner, hook.name, SCALED
        if isinstance(hook, WeightNorm) and key in (f"{hook.name}_g", f"{hook.name}_v"):
            return owner, hook.name, DIRECTION if key.endswith("_v") else _LENGTH
    return None


def _effect_of_list(owner: parametrize.ParametrizationList, key: str) -> Effect | str:
    if key == "original0":
        return _LENGTH
    result = SCALED
    for parametrization in owner:
        found = effect(parametrization)
        if isinstance(found, str):
            return found
        result += found
    return result
