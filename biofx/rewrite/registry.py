"""Registry: the base class of passes, their names and pipeline strings, and recipes."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from biofx.base.errors import ArgumentError, PipelineError
from biofx.base.option_values import option_fields
from biofx.base.options import check_integer
from biofx.model.slots import Slot

if TYPE_CHECKING:
    from torch import nn

    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.rewrite.model_editor import ModelEditor
    from biofx.training.plastic_weight import PlasticWeight


class Moment(enum.IntEnum):
    """When a rule acts around `optimizer.step()`, in this order.

    Attributes:
        GRADIENT: before the step, to add to `weight.gradient`, in place.
        GAIN: before the step, to set gains from the gradient, from state, from the weight.
        UPDATE: after the step, like all that follow, to change what the optimizer and gains did.
        TURNOVER: to replace synapses.
        SCALING: to change weights whatever the optimizer did.
        REFRESH: to draw gains anew.
        PROJECTION: to restore constraints that have to hold at the end.
    """

    GRADIENT = 1
    GAIN = 2
    UPDATE = 3
    TURNOVER = 4
    SCALING = 5
    REFRESH = 6
    PROJECTION = 7

    @property
    def before_step(self) -> bool:
        """Whether the rule acts before the optimizer changes the weights."""
        return self in (Moment.GRADIENT, Moment.GAIN)

    @property
    def writes(self) -> bool:
        """Whether the rule changes weights by itself, not the update of the optimizer."""
        return self in (Moment.TURNOVER, Moment.SCALING, Moment.PROJECTION)

    @property
    def follows(self) -> bool:
        """Whether the rule only corrects what the optimizer did, so it acts on frozen weights that move as well."""
        return self in (Moment.UPDATE, Moment.PROJECTION)


@dataclass(frozen=True)
class Pass:
    """A mechanism: a frozen dataclass whose fields are its options.

    Subclass it, set `name` and `slot`, and write `rewrite`. `passes.register` makes it available by its name.

    Attributes:
        name: the name in pipeline strings and tables.
        slot: where the pass inserts its nodes between the stored weight and its operator.
        moment: when the pass acts around `optimizer.step()`, if it does (see `biofx.attach`).
        preserves_function: whether the pass preserves the model's outputs, up to rounding; this is checked on example
            inputs.
        changes_units: whether the pass changes the set of units. Such a pass runs before all others, and calls
            `ModelEditor.look_again` after the change.
        converted: the options in which a checkpoint may differ from the model, because state is converted as it loads.
        sets_zeros: whether the rule sets synapses to 0 that are to grow again, which not every rule allows.
        works_on_shards: whether `at_step` works on a part of a weight, as under FSDP: entry by entry, with sums over a
            weight by `biofx.training.ranks.summed`. If not, `biofx.attach` refuses sharded weights.

    Raises:
        ArgumentError: an option out of its range, when the pass is made.
    """

    name: ClassVar[str]
    slot: ClassVar[Slot]
    moment: ClassVar[Moment | None] = None
    preserves_function: ClassVar[bool] = False
    changes_units: ClassVar[bool] = False
    converted: ClassVar[tuple[str, ...]] = ()
    sets_zeros: ClassVar[bool] = False
    works_on_shards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check")
            if check is not None and not (field.default is None and getattr(self, field.name) is None):
                check(self, field.name)

    @property
    def instead(self) -> str:
        """A clause for `summary` that names an alternative which preserves the outputs; empty if there is none."""
        return ""

    @property
    def acts_at_step(self) -> bool:
        """Whether the pass acts around `optimizer.step()`."""
        return self.moment is not None

    def rewrite_model(self, model: ModelEditor) -> None:
        """Rewrite a model weight by weight; a pass that needs all weights at once overrides this."""
        for name, site in model.sites.items():
            self.rewrite(site, model.edits[name])

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Rewrite one weight: insert nodes with `edit`, or leave the weight alone with `edit.leave(reason)`."""
        raise NotImplementedError(f"{type(self).__name__}.rewrite")

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Act on all weights that have a gradient, at this pass's moment of every step of their optimizer."""
        raise NotImplementedError(f"{type(self).__name__}.at_step")

    def held_together(self, bio: nn.Module) -> Iterable[Collection[str]]:
        """Names of weights on which the rule acts only if one optimizer holds all of them; `attach` warns otherwise.

        Args:
            bio: a model that the pass has rewritten.
        """
        return ()

    def violations(self, site: WeightSite) -> Iterator[str]:
        """One sentence for each invariant of this pass that a weight breaks, for `biofx.verify`."""
        yield from ()

    def __str__(self) -> str:
        """The pass as a pipeline string, with the options that differ from their defaults."""
        options = [
            f"{field.name}={_write(value)}"
            for field in option_fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


def option(default: Any, check: Callable[..., None], **bounds: Any) -> Any:
    """An option that is checked when the pass is made; None is valid if it is the default.

    Args:
        default: its default.
        check: `check_number`, `check_integer`, `check_choice` or `check_flag`, or a function like them.
        bounds: its keyword arguments.
    """
    return dataclasses.field(default=default, metadata={"check": functools.partial(check, **bounds)})


PassClass = TypeVar("PassClass", bound=type[Pass])
_PASSES: dict[str, type[Pass]] = {}
_RECIPES: dict[str, str] = {}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_WORD = re.compile(r"[\w.+-]+")
_TOKEN = re.compile(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*"|.""", re.DOTALL)  # a string literal or one character
_CLOSES = {"}": "{", "]": "[", ")": "("}
_OPENS = (*_CLOSES.values(), "'", '"')  # a quote alone is a token only if its string is not closed


def register(pass_class: PassClass) -> PassClass:
    """Make a pass known by its name, so that pipeline strings, tables and the test suite find it.

    A class of the same name and module replaces the earlier one, as when a notebook cell is run again. Models that were
    transformed before keep the earlier one, with all that it does at a step.

    Raises:
        ArgumentError: not a frozen dataclass derived from `Pass`, no slot, or a name that is malformed or taken.

    Example:
        >>> from dataclasses import dataclass
        >>> import biofx, torch
        >>> from biofx import passes
        >>> @passes.register
        ... @dataclass(frozen=True)
        ... class SlowDown(passes.Pass):
        ...     name = "slow-down"
        ...     slot = passes.Slot.HOOK
        ...     factor: float = 0.5
        ...
        ...     def rewrite(self, site, edit):
        ...         edit.insert(torch.ops.biofx.scale_grad, self.factor)
        >>> bio = biofx.transform(torch.nn.Linear(1, 1), "slow-down{factor=0.25}")
        >>> bio(torch.ones(1)).backward()
        >>> bio.weight.grad
        tensor([[0.2500]])
    """
    where = f"passes.register: {getattr(pass_class, '__name__', pass_class)}"
    if not (isinstance(pass_class, type) and issubclass(pass_class, Pass)):
        raise ArgumentError(f"{where} must be a class derived from passes.Pass")
    parameters = getattr(pass_class, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(pass_class) or parameters is None or not parameters.frozen:
        raise ArgumentError(f"{where} must be decorated with @dataclass(frozen=True), below @passes.register")
    _check_complete(pass_class, where)
    name, known = pass_class.name, _PASSES.get(pass_class.name)
    if name in _RECIPES or (known is not None and _origin(known) != _origin(pass_class)):
        holder = ".".join(_origin(known)) if known else "a recipe"
        raise ArgumentError(f"{where}: the name {name!r} is taken by {holder}")
    _PASSES[name] = pass_class
    return pass_class


def _check_complete(pass_class: type[Pass], where: str) -> None:
    if not isinstance(getattr(pass_class, "slot", None), Slot):
        raise ArgumentError(f"{where} must say which slot it fills: slot = passes.Slot.HOOK, say")
    name = getattr(pass_class, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(f"{where} needs a name of lower-case words joined by hyphens, got {name!r}")
    has_rule, moment = pass_class.at_step is not Pass.at_step, pass_class.moment
    if has_rule and moment is None:
        raise ArgumentError(f"{where} has at_step, which is called at a moment: add moment = passes.Moment.GAIN, say")
    if moment is not None and not has_rule:
        raise ArgumentError(
            f"{where} has moment = Moment.{moment.name}, and no method at_step(weights) to be called then"
        )


def _origin(pass_class: type[Pass]) -> tuple[str, str]:
    """Where a class was written: a cell or a module that runs again may register it again."""
    return pass_class.__module__, pass_class.__qualname__


def register_recipe(name: str, pipeline: str) -> None:
    """Name a pipeline, for `transform` and pipeline strings.

    Raises:
        ArgumentError: the name is malformed or taken.
        PipelineError: the pipeline does not parse.
    """
    if not _NAME.fullmatch(name) or name in _PASSES or _RECIPES.get(name, pipeline) != pipeline:
        raise ArgumentError(f"register_recipe: the name {name!r} is taken, or is not of lower-case words and hyphens")
    parse(pipeline)
    _RECIPES[name] = pipeline


def registered_passes() -> dict[str, type[Pass]]:
    """All registered passes by name."""
    return dict(sorted(_PASSES.items()))


def recipes() -> dict[str, str]:
    """The pipeline strings of all registered recipes, by name."""
    return dict(sorted(_RECIPES.items()))


def parse(pipeline: str) -> list[Pass]:
    """Read a pipeline string: `name`, `name{option=value,option=value}` or a recipe's name, separated by commas.

    Values are Python literals; a bare word is a string.

    Raises:
        PipelineError: the string is malformed, or a pass or option is unknown; the message lists the known ones.
        ArgumentError: a value that the pass refuses.

    Example:
        >>> from biofx.rewrite.registry import parse
        >>> [str(p) for p in parse("split-synapses{synapses=4},fuzzy-learning-rates{distribution=gamma}")]
        ['split-synapses{synapses=4}', 'fuzzy-learning-rates{distribution=gamma}']
    """
    result: list[Pass] = []
    for element in _split(pipeline):
        name, options = _name_and_options(element)
        if name in _PASSES:
            result.append(_build(_PASSES[name], options or []))
        elif name not in _RECIPES:
            raise PipelineError(f"pipeline string: unknown pass {name!r}{_suggest(name)}; {_known()}")
        elif options is not None:
            raise PipelineError(f"pipeline string: {name} is a recipe and takes no options")
        else:
            result += parse(_RECIPES[name])
    return result


def _name_and_options(element: str) -> tuple[str, list[str] | None]:
    braces = [i for i in _outside(element) if element[i] in "{}"]
    if not braces:
        return element, None
    start, end, *_ = braces
    if rest := element[end + 1 :].lstrip():
        raise _misplaced(element, len(element) - len(rest), "stands behind the options; a comma separates passes")
    return element[:start].strip(), _split(element[start + 1 : end])


def _suggest(name: str) -> str:
    hyphenated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).replace("_", "-").lower()
    close = difflib.get_close_matches(hyphenated, [*_PASSES, *_RECIPES], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _known() -> str:
    kinds = {"passes": sorted(_PASSES), "recipes": sorted(_RECIPES)}
    return "; ".join(f"the {kind} are {', '.join(names)}" for kind, names in kinds.items() if names)


def _build(pass_class: type[Pass], options: list[str]) -> Pass:
    fields = {field.name: field for field in option_fields(pass_class)}
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals:
            raise PipelineError(f"pipeline string: {pass_class.name}: {option!r} is not of the form option=value")
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise PipelineError(f"pipeline string: {pass_class.name} has no option {key!r}; its options are {known}")
        if key in values:
            raise PipelineError(f"pipeline string: {pass_class.name}: option {key!r} is given twice")
        values[key] = _read(value)
    return pass_class(**values)


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes."""
    commas = [i for i in _outside(text) if text[i] == ","]
    parts = [text[i + 1 : j].strip() for i, j in pairwise([-1, *commas, len(text)])]
    return [part for part in parts if part]


def _outside(text: str) -> list[int]:
    """The positions outside brackets and quotes, including the outermost brackets themselves."""
    opened: list[int] = []
    result: list[int] = []
    for token in _TOKEN.finditer(text):
        place, character = token.start(), token[0]
        if character in _CLOSES:
            if not opened:
                raise _misplaced(text, place, "closes nothing")
            if text[opened[-1]] != _CLOSES[character]:
                break
            opened.pop()
        if not opened:
            result.append(place)
        if character in _OPENS:
            opened.append(place)
    if opened:
        raise _misplaced(text, opened[-1], "is not closed")
    return result


def _misplaced(text: str, place: int, what: str) -> PipelineError:
    return PipelineError(f"pipeline string: {text[place]!r} at character {place + 1} of {text!r} {what}")


def _read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _write(value: Any) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) and _read(value) == value else repr(value)


def as_passes(passes: Sequence[Pass] | str) -> list[Pass]:
    """The passes given to `transform`, as objects.

    Raises:
        ArgumentError: not a list of pass objects or a string, or no pass at all.
        PipelineError: a pipeline string that does not parse.
    """
    if isinstance(passes, str):
        result = parse(passes)
    elif isinstance(passes, Pass) or (isinstance(passes, type) and issubclass(passes, Pass)):
        given = passes.__name__ + "()" if isinstance(passes, type) else repr(passes)
        raise ArgumentError(f"passes must be a list; write passes=[{given}]")
    elif isinstance(passes, Sequence):
        result = [*passes]
    else:
        raise ArgumentError(f"passes must be a list of passes or a pipeline string, got {type(passes).__name__}")
    for index, item in enumerate(result):
        if isinstance(item, type) and issubclass(item, Pass):
            raise ArgumentError(f"passes[{index}] is the class {item.__name__}; write {item.__name__}()")
        if isinstance(item, str):
            raise ArgumentError(
                f"passes[{index}] is the string {item!r}; give one string, passes={','.join(map(str, result))!r}, or a "
                "list of pass objects"
            )
        if not isinstance(item, Pass):
            raise ArgumentError(f"passes[{index}] is not a pass: {item!r}; {_known()}")
        _check_complete(type(item), f"passes[{index}]: {type(item).__name__}")
        if item.acts_at_step and hasattr(item, "every"):  # which the lifecycle reads
            check_integer(item, "every", at_least=1)
    if not result:
        raise ArgumentError(f"no pass given; {_known()}")
    return result
