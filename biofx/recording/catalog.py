"""Operators: what each dispatcher operator does to units, and whether it returns negative numbers.

This is the one vocabulary of biofx. Names are those of the dispatcher without namespace, overload and the underscore of
in-place operators. Composite operators arrive here as the operators that they consist of, and operators that PyTorch
tags as pointwise need no entry.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from biofx.base.torch_internals import OpOverload, schema_of


class Kind(enum.Enum):
    """What an operator does to units."""

    LAYOUT = "moves entries: executed on the unit numbers themselves"
    CONCATENATE = "puts tensors next to each other"
    KEEP = "acts on each entry by itself"
    NORM = "acts on each entry by itself, and multiplies each unit by a parameter"
    MERGE = "joins entries of several tensors, one by one"
    REDUCE = "joins entries along axes"
    ALONG = "joins entries along axes, and keeps the axes"
    WINDOW = "joins entries along the axes of space"
    WRITE = "puts entries of one tensor into another"
    PRODUCT = "multiplies matrices"
    CONVOLUTION = "convolves"
    EMBEDDING = "looks up rows"
    ATTENTION = "weighted averages of the rows of a tensor"
    GATES = "one step of a recurrent layer in one piece"
    CONSTANT = "depends on no value"
    UNKNOWN = "cannot be followed"


class Sign(enum.Enum):
    """Whether an operator returns negative numbers."""

    NEVER = "whatever it is given"
    PASSED = "only if it is given some"
    ODD = "only if it is given some, but it is the operator that people would name"
    ANY = "maybe"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYOUT = _names(
    "view _unsafe_view reshape _reshape_alias t transpose permute expand unsqueeze squeeze slice select split "
    "split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk unbind flip roll repeat repeat_interleave "
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d unfold im2col diagonal pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
    "tril triu rot90 as_strided index index_select gather take view_as_real view_as_complex real imag diag_embed "
    "_pack_padded_sequence _pad_packed_sequence"
)
_CONCATENATIONS = _names("cat stack")
COPIES = _names(
    "alias detach clone _to_copy lift_fresh lift_fresh_copy lift contiguous _conj _neg_view resolve_conj resolve_neg "
    "to _to_dense"
)
_NORMS = _names(
    "native_layer_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm "
    "miopen_batch_norm native_group_norm _fused_rms_norm rms_norm"
)
_KEEP = COPIES | _names(
    "native_dropout _softmax _safe_softmax softmax _log_softmax log_softmax rrelu_with_noise _prelu_kernel "
    "_fused_dropout _weight_norm_interface leaky_relu"
)
_REDUCTIONS = _names(
    "mean sum nansum amax amin max min median nanmedian var std var_mean std_mean prod logsumexp linalg_vector_norm "
    "norm aminmax"
)
_ALONG = _names("cumsum cumprod cummax cummin logcumsumexp sort topk kthvalue mode _fft_r2c _fft_c2c _fft_c2r")
_WINDOWS = _names(
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices max_pool2d mkldnn_max_pool2d avg_pool1d "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "grid_sampler_2d grid_sampler_3d max_unpool2d max_unpool3d"
)
_WRITES = _names(
    "copy index_put _index_put_impl index_add index_copy scatter scatter_add scatter_reduce masked_scatter "
    "slice_scatter select_scatter diagonal_scatter _unsafe_index_put"
)
_PRODUCTS = _names("mm bmm addmm baddbmm addbmm mv addmv dot vdot linear matmul _trilinear")
_ATTENTIONS = _names(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable "
    "scaled_dot_product_attention"
)
_GATES = _names("_thnn_fused_lstm_cell _thnn_fused_gru_cell")
MAKES_CONSTANTS = _names(
    "zeros ones full empty empty_strided new_zeros new_ones new_full new_empty new_empty_strided zeros_like ones_like "
    "full_like empty_like rand_like randn_like randint_like"
)
"""Operators that take no more than the shape, dtype and device of their operands."""

_CONSTANTS = MAKES_CONSTANTS | _names(
    "arange range linspace logspace eye scalar_tensor rand randn randint randperm normal uniform bernoulli random "
    "exponential cauchy log_normal geometric zero fill tril_indices triu_indices one_hot multinomial"
)

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(_LAYOUT, Kind.LAYOUT),
    **dict.fromkeys(_CONCATENATIONS, Kind.CONCATENATE),
    **dict.fromkeys(_KEEP, Kind.KEEP),
    **dict.fromkeys(_NORMS, Kind.NORM),
    **dict.fromkeys(_REDUCTIONS, Kind.REDUCE),
    **dict.fromkeys(_ALONG, Kind.ALONG),
    **dict.fromkeys(_WINDOWS, Kind.WINDOW),
    **dict.fromkeys(_WRITES, Kind.WRITE),
    **dict.fromkeys(_PRODUCTS, Kind.PRODUCT),
    "convolution": Kind.CONVOLUTION,
    "mkldnn_convolution": Kind.CONVOLUTION,
    **dict.fromkeys(_names("embedding _embedding_bag _embedding_bag_forward_only"), Kind.EMBEDDING),
    **dict.fromkeys(_ATTENTIONS, Kind.ATTENTION),
    **dict.fromkeys(_GATES, Kind.GATES),
    **dict.fromkeys(_CONSTANTS, Kind.CONSTANT),
    **dict.fromkeys(_names("glu complex polar ldexp"), Kind.MERGE),
}

_aten = torch.ops.aten
_OF_OTHER_KIND: dict[Any, Kind] = {
    **dict.fromkeys((_aten.max.other, _aten.min.other, _aten.normal.Tensor_Tensor), Kind.MERGE),
    **dict.fromkeys((_aten.masked_fill_.Scalar, _aten.masked_fill_.Tensor), Kind.KEEP),
    **dict.fromkeys((_aten.bernoulli.default, _aten.normal.Tensor_float, _aten.normal.float_Tensor), Kind.KEEP),
}
"""Overloads that differ from what their name says, such as those that draw from distributions that units give."""

_NEVER_NEGATIVE = _names(
    "relu sigmoid hardsigmoid softplus exp exp2 abs square _softmax _safe_softmax softmax sqrt rsqrt var std "
    "linalg_vector_norm norm hypot cosh"
)
_ODD = _names(
    "tanh leaky_relu _prelu_kernel rrelu_with_noise elu gelu silu mish hardswish softshrink hardshrink erf expm1 atan "
    "sinh asinh asin erfinv"
)
_PASSED = _names(
    "add mul div true_divide maximum minimum fmax fmin where glu pow clamp clamp_min clamp_max hardtanh log1p sgn "
    "sign reciprocal nan_to_num round floor ceil trunc masked_fill native_dropout _fused_dropout cumsum cumprod "
    "cummax cummin sort topk kthvalue mode mean sum nansum amax amin max min median nanmedian prod lerp aminmax "
    "remainder fmod addcmul mm bmm addmm baddbmm addbmm mv addmv dot matmul max_unpool2d max_unpool3d relu6 ldexp"
) | (_LAYOUT | COPIES - _names("_conj _neg_view") | _WRITES | _CONCATENATIONS | _ATTENTIONS)
_OVERSHOOTING = _names("upsample_bicubic2d _upsample_bicubic2d_aa")
_SIGNS: dict[str, Sign] = {
    **dict.fromkeys(_PASSED | _WINDOWS - _OVERSHOOTING, Sign.PASSED),
    **dict.fromkeys(_NEVER_NEGATIVE, Sign.NEVER),
    **dict.fromkeys(_ODD, Sign.ODD),
}

LAYERS = _names(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear embedding embedding_bag "
    "multi_head_attention_forward lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
)
"""Functions of PyTorch that are called with a weight."""

PRODUCTS_OF_ENTRIES = _names("mul div true_divide")
BOUNDS = _names("min min_val exponent ord p correction scale threshold negative_slope lower upper lambd")
"""Numbers among arguments that make nothing negative, whatever their sign."""


def name_of(operator: Any) -> str:
    """The name of a dispatcher operator."""
    schema = schema_of(operator)
    if schema is None:  # a higher-order operator
        return str(operator)
    namespace, _, name = schema.name.partition("::")
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return name if namespace in ("aten", "prims") else f"{namespace}.{name}"


@cache
def kind_of(operator: Any) -> Kind:
    """What an operator does to the units of its operands."""
    name = name_of(operator)
    if operator in _OF_OTHER_KIND:
        return _OF_OTHER_KIND[operator]
    if name in _KINDS:
        return _KINDS[name]
    if torch.Tag.pointwise in getattr(operator, "tags", ()):
        tensors = [a for a in schema_of(operator).arguments if "Tensor" in str(a.type)]
        return Kind.MERGE if len(tensors) > 1 else Kind.KEEP
    return Kind.UNKNOWN


def sign_of(name: str) -> Sign:
    """Whether an operator returns negative numbers."""
    return _SIGNS.get(name, Sign.ANY)


@cache
def decomposed(operator: Any) -> Callable[..., Any] | None:
    """The decomposition of an operator that has no entry here; None if it has one, or cannot be decomposed."""
    if not isinstance(operator, OpOverload):
        return None
    is_known = kind_of(operator) is not Kind.UNKNOWN and name_of(operator) not in ("linear", "matmul")
    if is_known or schema_of(operator).is_mutable:
        return None
    if operator.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
        return operator.decompose  # inference mode hands them over whole
    return _decompositions().get(operator)


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return dict(torch.export.default_decompositions().items())


@cache
def number_arguments(operator: Any) -> tuple[str, ...]:
    """The arguments of an operator that may be a number that takes part as entries do; no sizes, axes or flags."""
    types = {argument.name: str(argument.type) for argument in schema_of(operator).arguments}
    return tuple(
        n for n, t in types.items() if t.removeprefix("Optional[").rstrip("]") in ("Tensor", "number", "float")
    )


@cache
def argument_positions(operator: Any) -> dict[str, tuple[int, Any]]:
    """The position and the default of each argument of an operator, by its name."""
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(schema_of(operator).arguments)
    }
