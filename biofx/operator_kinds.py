"""What operators do to units: those that only move them, keep them, join them, or mix them."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from biofx.chain import attribute, callee
from biofx.islands import is_island, island_path


class Kind(enum.Enum):
    """What becomes of units in an operator."""

    LAYOUT = "moves values: executed on the unit numbers themselves"
    CONCATENATE = "puts tensors beside each other"
    KEEP = "acts on each value by itself"
    NORM = "acts on each value by itself, and multiplies each unit by a parameter"
    WINDOW = "joins values along the axes of space"
    REDUCE = "joins values along the axes that it is given"
    MERGE = "joins values of several tensors, entry by entry"
    MIX = "weighted sums of the rows of one operand"
    CONSTANT = "depends on no value"
    UNKNOWN = "cannot be followed"


class Sign(enum.Enum):
    """Whether an operator returns negative values."""

    NEVER = "whatever it is given"
    PASSED = "only if it is given some"
    ODD = "only if it is given some, but it is the operator that people would name"
    ANY = "maybe"


@dataclass(frozen=True)
class Operation:
    """A call as the unit analysis sees it.

    Attributes:
        name: the operator's name in tables.
        kind: what it does to units.
        sign: whether it returns negative values.
        key: the name without case, underscores and number of dimensions: one for `F.max_pool2d` and `nn.MaxPool2d`.
        axes: the number of axes of space in its name, or 0.
        changes: the node whose tensor it changes in place, if it does.
    """

    name: str
    kind: Kind
    sign: Sign
    key: str
    axes: int
    changes: fx.Node | None

    @property
    def is_product(self) -> bool:
        """Whether it multiplies or divides."""
        return self.key in _PRODUCTS

    @property
    def takes_values(self) -> bool:
        """Whether numbers among its arguments take part as values, so that negative ones show in the result."""
        return self.key in _TAKES_VALUES


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYOUT = _names(
    "getitem values flatten ravel view viewas reshape reshapeas unflatten permute transpose t mt h mh swapaxes "
    "swapdims movedim moveaxis unsqueeze squeeze atleast hstack vstack dstack columnstack chunk split splitwithsizes "
    "tensorsplit unsafechunk unsafesplit unbind narrow select slice indexselect gather takealongdim expand expandas "
    "broadcastto repeat repeatinterleave tile roll flip fliplr flipud rot90 pixelshuffle pixelunshuffle channelshuffle "
    "nativechannelshuffle pad zeropad constantpad constantpadnd reflectionpad replicationpad circularpad unfold "
    "diagonal tril triu unsafeview index"
)
_CONCATENATIONS = _names("cat concat concatenate stack")
_CASTS = _names(
    "clone contiguous detach data to tocopy type typeas float double half bfloat16 cuda cpu identity alias liftfresh "
    "liftfreshcopy"
)
_DROPOUT = _names("dropout featuredropout")
_NEVER_NEGATIVE = _names("relu relu6 sigmoid hardsigmoid softplus exp abs absolute square softmax softmin sqrt rsqrt")
_ODD = _names(
    "tanh hardtanh leakyrelu prelu rrelu elu celu selu gelu silu mish hardswish softsign tanhshrink hardshrink "
    "softshrink erf expm1 atan sinh asinh"
)
_SIGNED = _names(
    "alphadropout featurealphadropout logsigmoid logsoftmax threshold neg negative log log2 log10 sin cos normalize "
    "localresponsenorm"
)
_CLAMPS = _names("clamp clip clampmin clampmax")
_SIGN_KEEPING = _names("log1p sign reciprocal nantonum round floor maskedfill")
_NORMS = _names("batchnorm syncbatchnorm layernorm groupnorm rmsnorm instancenorm")
_WINDOWS = _names(
    "maxpool avgpool adaptiveavgpool adaptivemaxpool lppool fractionalmaxpool interpolate upsample upsamplingnearest "
    "upsamplingbilinear upsamplenearest upsamplebilinear"
)
_AVERAGES = _names("mean sum nanmean nansum amax amin max min median prod")
_DEVIATIONS = _names("var std norm")
_SUMS = _names("add")
_PRODUCTS = _names("mul multiply div truediv divide floordiv floordivide")
_DIFFERENCES = _names("sub rsub subtract lerp addcmul addcdiv logaddexp")
_EXTREMA = _names("maximum minimum fmax fmin where glu pow floatpower")
_MIXES = _names("matmul bmm mm scaleddotproductattention")
_CONSTANTS = _names(
    "zeros ones full empty newzeros newones newfull newempty zeroslike oneslike fulllike emptylike arange linspace eye "
    "shape size dim ndim ndimension numel nelement len device dtype getdevice isfloatingpoint "
    "symsize symnumel symstride"
)
_TAKES_VALUES = _SUMS | _PRODUCTS | _names("maskedfill where nantonum clampmax pad")
_TAKES_VALUES |= _names("full newfull fulllike arange linspace")

_KINDS = {
    **dict.fromkeys(_LAYOUT, Kind.LAYOUT),
    **dict.fromkeys(_CONCATENATIONS, Kind.CONCATENATE),
    **dict.fromkeys(_CASTS | _DROPOUT | _NEVER_NEGATIVE | _ODD | _SIGNED | _CLAMPS | _SIGN_KEEPING, Kind.KEEP),
    **dict.fromkeys(_NORMS, Kind.NORM),
    **dict.fromkeys(_WINDOWS, Kind.WINDOW),
    **dict.fromkeys(_AVERAGES | _DEVIATIONS | {"logsumexp"}, Kind.REDUCE),
    **dict.fromkeys(_SUMS | _PRODUCTS | _DIFFERENCES | _EXTREMA | {"hypot"}, Kind.MERGE),
    **dict.fromkeys(_MIXES, Kind.MIX),
    **dict.fromkeys(_CONSTANTS, Kind.CONSTANT),
}
_SIGNS = {
    **dict.fromkeys(_LAYOUT | _CONCATENATIONS | _CASTS | _DROPOUT | _CLAMPS | _SIGN_KEEPING, Sign.PASSED),
    **dict.fromkeys(_WINDOWS | _AVERAGES | _SUMS | _PRODUCTS | _EXTREMA | _MIXES, Sign.PASSED),
    **dict.fromkeys(_NEVER_NEGATIVE | _DEVIATIONS | _CONSTANTS | {"hypot"}, Sign.NEVER),
    **dict.fromkeys(_ODD, Sign.ODD),
}
_PACKAGES = ("torch", "_operator", "math", "builtins")


def operation(node: fx.Node, bio: nn.Module) -> Operation:
    """What a call in the graph does to units. A function or module from outside of PyTorch cannot be followed."""
    name = str(node.args[1]) if node.target is getattr else callee(node)
    if node.op == "call_module":
        name = type(bio.get_submodule(str(node.target))).__name__
    if is_island(node):
        name = type(bio.get_submodule(island_path(node))).__name__
    key, axes = _key(name.rpartition(".")[2])
    kind = _KINDS.get(key, Kind.UNKNOWN) if _is_of_pytorch(node, bio) else Kind.UNKNOWN
    if key in ("max", "min") and len(node.all_input_nodes) > 1:  # of two tensors
        kind = Kind.MERGE
    sign = Sign.ANY if kind is Kind.UNKNOWN else _SIGNS.get(key, Sign.ANY)
    return Operation(name, kind, sign, key, axes, _changed(node, bio))


def argument(node: fx.Node, bio: nn.Module, position: int, *names: str, default: Any = None) -> Any:
    """What a call is given by position or by one of several names, or what its module keeps under that name."""
    if node.op == "call_module":
        module = bio.get_submodule(str(node.target))
        return next((getattr(module, name) for name in names if hasattr(module, name)), default)
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def held_parameter(node: Any, bio: nn.Module, operations: dict[fx.Node, Operation]) -> str | None:
    """Name of the parameter whose values a node has, in whatever layout, or None."""
    while node in operations and (operations[node].kind is Kind.LAYOUT or operations[node].key in _CASTS):
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return str(node.target) if isinstance(attribute(bio, str(node.target)), nn.Parameter) else None


def _key(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+?)(?:([123])d)?(?:withindices)?", name.lower().replace("_", ""))
    return (match[1], int(match[2] or 0)) if match else (name, 0)


def _is_of_pytorch(node: fx.Node, bio: nn.Module) -> bool:
    if node.op == "call_method":
        return True
    called = type(bio.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    package = getattr(called, "__module__", None)  # builtin functions of PyTorch may have none
    return package is None or str(package).partition(".")[0] in _PACKAGES


def _changed(node: fx.Node, bio: nn.Module) -> fx.Node | None:
    if node.op == "call_module":
        in_place = bool(getattr(bio.get_submodule(str(node.target)), "inplace", False))
    else:
        name = callee(node)
        in_place = node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))
    return node.all_input_nodes[0] if in_place and node.all_input_nodes else None
