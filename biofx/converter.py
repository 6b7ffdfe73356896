"""Converter: the interface of pytorch-bio-transformations, whose users call rules by hand, on top of `transform`."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biofx.analysis.sites import l1, weight_sites
from biofx.base.errors import ArgumentError, LifecycleError
from biofx.capture.captured_module import CapturedModule
from biofx.compiler import transform
from biofx.model.gradient_hooks import is_hook
from biofx.model.provenance import record_of
from biofx.rewrite.registry import Pass, registered_passes
from biofx.signs.scales import project_scales, scales_of
from biofx.training.hook_switch import leave_rules_to_caller
from biofx.training.plastic_weight import PlasticWeight


class Distribution(str, enum.Enum):
    """Names of the distributions of fuzzy learning rates; plain strings are accepted as well."""

    BASELINE = "baseline"
    UNIFORM = "uniform"
    NORMAL = "normal"
    LOGNORMAL = "lognormal"
    GAMMA = "gamma"
    BETA = "beta"
    LAYER_ADAPTIVE = "layer_adaptive"
    WEIGHT_ADAPTIVE = "weight_adaptive"
    TEMPORAL = "temporal"
    ACTIVITY = "activity"


class BioConfig(NamedTuple):
    """Options of `BioConverter`, with the names and defaults of pytorch-bio-transformations 0.0.5.

    The comment names the pass and its option, where range and meaning are documented.
    """

    weight_splitting_activation_function: Callable[[Any], Any] = nn.Identity()  # GroupUnits: activation
    fuzzy_learning_rate_factor_nu: float = 0.16  # FuzzyLearningRates: nu
    dampening_factor: float = 0.6  # Crystallize: dampening
    crystal_thresh: float = 4.5e-05  # Crystallize: threshold
    rejuvenation_parameter_dre: float = 8.0  # Rejuvenate: dre
    weight_splitting_Gamma: int = 0  # noqa: N815 - the reference's name; GroupUnits: size, no groups below 2
    apply_dales_principle: bool = False  # DalesPrinciple
    base_lr: float = 0.1  # VolumeDependentLearningRates: base_lr
    stability_factor: float = 2.0  # VolumeDependentLearningRates: stability
    lr_variability: float = 0.2  # VolumeDependentLearningRates: variability
    fuzzy_lr_distribution: Distribution | str = Distribution.UNIFORM  # FuzzyLearningRates: distribution
    fuzzy_lr_min: float = 0.5  # FuzzyLearningRates: minimum
    fuzzy_lr_max: float = 2.0  # FuzzyLearningRates: maximum
    fuzzy_lr_dynamic: bool = False  # whether update_fuzzy_learning_rates() does anything
    fuzzy_lr_decay: float = 0.9995  # FuzzyLearningRates: decay
    fuzzy_lr_update_freq: int = 100  # FuzzyLearningRates: every, counted in calls
    fuzzy_lr_layer_index: int = -1  # ignored: depth in the graph is known
    fuzzy_lr_total_layers: int = -1  # ignored: depth in the graph is known


DEFAULT_BIO_CONFIG = BioConfig()


class BioConverter:
    """Convert models as pytorch-bio-transformations does: `BioConverter(...)(model)`, then call rules by hand.

    The result is a transformed model with the methods that users of that package call between `backward()` and `step()`
    (see `Converted`). Rules act only when they are called; do not use `biofx.attach` in addition. Rules act on every
    layer that biofx knows, not only on `Linear` and `Conv2d`.

    Rules called by hand scale gradients, and an adaptive optimizer such as Adam cancels constant factors. With
    `biofx.transform` and `biofx.attach`, rules act on the update of such an optimizer.

    Args:
        config: the options.
        kwargs: single options, instead of or on top of `config`.

    Raises:
        ArgumentError: an option does not exist. `convert` raises if a value is out of range.

    Example:
        >>> import torch
        >>> from biofx import BioConverter
        >>> model = BioConverter(fuzzy_learning_rate_factor_nu=0.2)(torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> model.volume_dependent_lr()
        >>> model.fuzzy_learning_rates()
        >>> model.crystallize()
        >>> optimizer.step()
        >>> model.rejuvenate_weights()
    """

    def __init__(self, config: BioConfig = DEFAULT_BIO_CONFIG, **kwargs: Any) -> None:
        self.config = _replace(config, kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> BioConverter:
        """A converter with options from a dictionary."""
        return cls(**config_dict)

    def get_config(self) -> BioConfig:
        """The present options."""
        return self.config

    def update_config(self, **kwargs: Any) -> None:
        """Change options for later conversions."""
        self.config = _replace(self.config, kwargs)

    def __call__(self, module_class_or_instance: Any) -> Any:
        """The same as `convert`; makes the converter a class decorator."""
        return self.convert(module_class_or_instance)

    def convert(self, module_class_or_instance: Any) -> Any:
        """Convert a module, or a class of modules.

        Args:
            module_class_or_instance: a module, of which a converted copy is returned; or a class, of which a subclass
                is returned whose calls build converted modules.

        Raises:
            ArgumentError: the argument is neither, or an option is out of range.
        """
        target = module_class_or_instance
        if isinstance(target, type) and issubclass(target, nn.Module):
            return self._convert_class(target)
        return self._convert_instance(target)

    @staticmethod
    def set_last_module_token_for_module(module: nn.Module) -> nn.Module:
        """Exclude the units of a layer from grouping; those of output layers are never grouped."""
        module.last_module_token = True  # type: ignore[assignment]
        return module

    def _convert_class(self, module_class: type[nn.Module]) -> type[nn.Module]:
        def build(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
            return self._convert_instance(module_class(*args, **kwargs))

        namespace = {"__new__": build, "__doc__": module_class.__doc__, "__module__": module_class.__module__}
        return type(module_class.__name__, (module_class,), namespace)

    def _convert_instance(self, module: nn.Module) -> Converted:
        *rules, groups = self._passes()
        if groups is not None:
            marked = [n for n, m in module.named_modules() if hasattr(m, "last_module_token")]
            patterns = [f"{n}.*" if n else "*" for n in marked if [*module.get_submodule(n).parameters()]]
            module = transform(module, [groups], exclude=patterns)
        bio = transform(module, [rule for rule in rules if rule is not None])
        leave_rules_to_caller(bio)  # rules act when they are called, not in the backward pass
        converted = _with_methods(bio)
        converted.calls, converted.dynamic = Counter(), self.config.fuzzy_lr_dynamic
        return converted

    def _passes(self) -> list[Pass | None]:
        known: Mapping[str, Any] = registered_passes()
        c = self.config
        identity = isinstance(c.weight_splitting_activation_function, nn.Identity)
        return [
            known["fuzzy-learning-rates"](
                nu=c.fuzzy_learning_rate_factor_nu,
                distribution=getattr(c.fuzzy_lr_distribution, "value", c.fuzzy_lr_distribution),
                minimum=c.fuzzy_lr_min,
                maximum=c.fuzzy_lr_max,
                decay=c.fuzzy_lr_decay,
                every=c.fuzzy_lr_update_freq,
            ),
            known["volume-dependent-learning-rates"](
                base_lr=c.base_lr, stability=c.stability_factor, variability=c.lr_variability
            ),
            known["crystallize"](threshold=c.crystal_thresh, dampening=c.dampening_factor),
            known["rejuvenate"](dre=c.rejuvenation_parameter_dre),
            known["synaptic-scaling"](),
            known["dales-principle"]() if c.apply_dales_principle else None,
            known["group-units"](
                size=c.weight_splitting_Gamma,
                activation=None if identity else c.weight_splitting_activation_function,
            )
            if c.weight_splitting_Gamma > 1
            else None,
        ]


class Converted(CapturedModule):
    """A model that `BioConverter` made: a transformed model whose rules are called by hand.

    Between `backward()` and `optimizer.step()`: `volume_dependent_lr`, `fuzzy_learning_rates`, `scale_grad`,
    `crystallize`. At any time: `rejuvenate_weights`, `update_fuzzy_learning_rates`, `enforce_dales_principle`,
    `l1_reg`. The formulas are those of the passes. Weights without a gradient are skipped; a method raises if no
    weight has one.

    Unlike rules under `biofx.attach`, rules called by hand do not check for non-finite values, do not clear the
    optimizer's state of replaced synapses, and do not store in `state_dict` how often they were called.
    """

    calls: Counter[str]
    dynamic: bool

    def volume_dependent_lr(self) -> None:
        """Multiply gradients by the factors of `VolumeDependentLearningRates`, with new noise at every call."""
        self._scale_gradients("volume-dependent-learning-rates")
        _count_call(self._weights("volume-dependent-learning-rates"))

    def fuzzy_learning_rates(self) -> None:
        """Multiply gradients by the gains of `FuzzyLearningRates`."""
        self._scale_gradients("fuzzy-learning-rates")

    def scale_grad(self) -> None:
        """Multiply gradients by the homeostatic factors of `SynapticScaling`, after updating them."""
        self._at_step("synaptic-scaling")
        self._scale_gradients("synaptic-scaling")

    def crystallize(self) -> None:
        """Dampen gains as `Crystallize` does."""
        self._at_step("crystallize", needs_gradients=True)

    def rejuvenate_weights(self) -> None:
        """Replace synapses as `Rejuvenate` does."""
        self._at_step("rejuvenate")

    def update_fuzzy_learning_rates(self, x: Tensor | None = None) -> None:
        """Refresh dynamic gains as `FuzzyLearningRates` does; the model observes its activity itself, without `x`."""
        if self.dynamic:
            self._at_step("fuzzy-learning-rates")

    def enforce_dales_principle(self) -> None:
        """Project weights on the signs of `DalesPrinciple`."""
        if not any(run.pass_.name == "dales-principle" for run in record_of(self).passes):
            raise LifecycleError("enforce_dales_principle: convert the model with apply_dales_principle=True")
        self._at_step("dales-principle")
        with torch.no_grad():
            project_scales(scales_of(self))

    def l1_reg(self) -> Tensor:
        """Sum of the magnitudes of all weights, differentiable (`biofx.l1`)."""
        return l1(self)

    def __copy__(self) -> Converted:
        return _with_methods(super().__copy__())

    def __reduce__(self) -> tuple[Any, ...]:
        build, arguments, state = super().__reduce__()
        return _build, (build, arguments), state

    def _weights(self, by: str, *, with_gradients: bool = False) -> list[PlasticWeight]:
        changed = {name for run in record_of(self).passes if run.pass_.name == by for name in run.weights}
        sites = [site for name, site in weight_sites(self).items() if name in changed]
        if with_gradients:
            sites = [site for site in sites if site.raw.grad is not None]
            if not sites:
                raise LifecycleError(f"{by}: no weight has a gradient; call backward() first")
        gradients = [torch.empty(0) if site.raw.grad is None else site.raw.grad for site in sites]
        return [
            PlasticWeight(site=site, raw=site.raw, gradient=gradient, optimizer=None, step=self.calls[by], by=by)
            for site, gradient in zip(sites, gradients, strict=True)
        ]

    @torch.no_grad()
    def _scale_gradients(self, by: str) -> None:
        for weight in self._weights(by, with_gradients=True):
            synapses = weight.site.known_synapses
            hooks = [link for link in synapses.links if by in link.origin.passes and is_hook(link.target)]
            weight.gradient.copy_(synapses.scaled(weight.gradient, weight.raw, reversed(hooks)))

    @torch.no_grad()
    def _at_step(self, by: str, *, needs_gradients: bool = False) -> None:
        self.calls[by] += 1
        pass_ = next(run.pass_ for run in record_of(self).passes if run.pass_.name == by)
        if pass_.acts_at_step:
            weights = self._weights(by, with_gradients=needs_gradients)
            pass_.at_step(weights)
            _count_call(weights)


def _count_call(weights: list[PlasticWeight]) -> None:
    """Count a call, so that the next one draws new noise, as the next step of an optimizer does."""
    torch._foreach_add_([weight.state("steps") for weight in weights], 1)


def _with_methods(bio: nn.Module) -> Converted:
    cls: Any = type(bio)  # of this model alone; its forward refers to it, so a new class could not take its place
    cls.__bases__ = tuple(Converted if base is CapturedModule else base for base in cls.__bases__)
    assert isinstance(bio, Converted)
    return bio


def _build(build: Callable[..., CapturedModule], arguments: tuple[Any, ...]) -> Converted:
    return _with_methods(build(*arguments))


def _replace(config: BioConfig, options: Mapping[str, Any]) -> BioConfig:
    unknown = sorted(set(options) - set(BioConfig._fields))
    if unknown:
        raise ArgumentError(
            f"BioConverter: unknown option {unknown[0]!r}; the options are {', '.join(BioConfig._fields)}"
        )
    return config._replace(**options)
