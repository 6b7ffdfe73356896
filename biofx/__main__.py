"""Command line: `biofx` (or `python -m biofx`) transforms a model, and prints, draws, compares or exports it."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import fx, nn

import biofx
from biofx.base.option_values import option_fields
from biofx.base.randomness import generator
from biofx.compiler import FRONTENDS
from biofx.looking.drawing import SUFFIXES
from biofx.output.export import PROGRAMS, WEIGHTS
from biofx.rewrite import registry

EXAMPLES = """examples:
  biofx passes
  biofx inspect torchvision.models:resnet18 --passes cortex --input 2,3,224,224
  biofx units my_package.models:make_rnn --input 8,50,10
  biofx draw my_package.models:make_rnn rnn.html --passes "split-synapses{synapses=4},dales-principle"
  biofx diff my_package.models:make_rnn --passes cortex --draw added.svg
  biofx export my_package.models:make_rnn rnn.onnx --saved trained/ --input 8,50,10:float32

exit status: 0, or 1 for an error in what was given, or 2 for arguments that are no command"""

CLOSED_PIPE, INTERRUPTED = 141, 130  # as a shell reports the signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options), flush=True)
    except biofx.BiofxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # such as `biofx passes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("biofx", description=biofx.__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"biofx {biofx.__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], str], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=layout)
        added.set_defaults(run=run)
        return added

    command("passes", _passes, "list all passes with their options, and all recipes")
    look = command("inspect", _inspect, "transform a model, and print what became of each weight")
    units = command("units", _units, "print which units each weight reads")
    draw = command("draw", _draw, "transform a model, and draw its graph")
    diff = command("diff", _diff, "print what passes insert into the graph of a model, remove and change")
    write = command("export", _export, "transform and fold a model, and write it to a file")
    for each in (look, units, draw, diff, write):
        _add_model(each, needs_passes=each is not units)
    look.add_argument("--nodes", action="store_true", help="also print the inserted nodes")
    draw.add_argument("path", help=f"a file; its suffix selects the format: {', '.join(SUFFIXES)}")
    draw.add_argument("--depth", type=int, help="how many levels of modules are open")
    diff.add_argument("--against", metavar="PASSES", help="compare with what these passes make, not with the model")
    diff.add_argument("--draw", metavar="PATH", help="also draw it, to a file as for draw")
    write.add_argument("path", help=f"a file; its suffix selects the format: {', '.join([*PROGRAMS, *WEIGHTS])}")
    return parser


def _add_model(command: argparse.ArgumentParser, *, needs_passes: bool) -> None:
    command.add_argument("model", metavar="module:factory", help="a callable without arguments that returns the model")
    made = command.add_mutually_exclusive_group(required=needs_passes)
    made.add_argument("--passes", help="pipeline string, or the name of a recipe")
    made.add_argument("--saved", metavar="FOLDER", help="a folder that biofx.save wrote, in place of passes")
    command.add_argument("--frontend", default="symbolic", choices=FRONTENDS, help="(default: symbolic)")
    command.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: 0)")
    command.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave matching weights alone")
    command.add_argument(
        "--input",
        action="append",
        type=_input,
        metavar="2,3,224,224:float32",
        help="sizes and dtype of an example input of the model (default: float32); repeat it for each input; "
        f"export needs it for {' and '.join(PROGRAMS)}",
    )


def _input(text: str) -> torch.Tensor:
    """An example input from its sizes and dtype: random numbers, or ones, which are a token and a mask alike."""
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not re.fullmatch(r"\d+(,\d+)*", sizes) or not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(
            f"must be sizes and a dtype, such as 2,3,224,224:float32 or 2,16:int64, got {text!r}"
        )
    shape = tuple(map(int, sizes.split(",")))
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, generator=generator(0, "example input", text)).to(dtype)


def _transformed(options: argparse.Namespace, passes: str | None = None) -> fx.GraphModule:
    """The model with the passes of the options, or with others, or as it was saved."""
    model, inputs = _build(options.model), _inputs(options)
    if options.saved is not None and passes is None:
        return biofx.load(options.saved, model, inputs)
    return biofx.transform(
        model,
        passes or options.passes,
        example_inputs=inputs,
        frontend=options.frontend,
        seed=options.seed,
        exclude=options.exclude,
    )


def _inputs(options: argparse.Namespace) -> tuple[torch.Tensor, ...] | None:
    return None if options.input is None else tuple(options.input)


def _inspect(options: argparse.Namespace) -> str:
    bio = _transformed(options)
    return biofx.summary(bio) + (f"\n\n{biofx.table(bio)}" if options.nodes else "")


def _units(options: argparse.Namespace) -> str:
    is_plain = options.passes is None and options.saved is None
    return str(biofx.units(_build(options.model) if is_plain else _transformed(options), _inputs(options)))


def _draw(options: argparse.Namespace) -> str:
    biofx.draw(_transformed(options), options.path, depth=options.depth, example_inputs=_inputs(options))
    return f"wrote {options.path}"


def _diff(options: argparse.Namespace) -> str:
    before = _build(options.model) if options.against is None else _transformed(options, options.against)
    found = biofx.diff(before, _transformed(options))
    if options.draw is None:
        return str(found)
    found.draw(options.draw)
    return f"{found}\n\nwrote {options.draw}"


def _export(options: argparse.Namespace) -> str:
    if options.input is None and Path(options.path).suffix in PROGRAMS:
        raise biofx.ArgumentError(
            f"{options.path} needs an example of each input of the model, such as --input 2,3,224,224:float32"
        )
    biofx.export(_transformed(options), options.path, _inputs(options))
    return f"wrote {options.path}"


def _passes(options: argparse.Namespace) -> str:
    rows = []
    for name, pass_class in registry.registered_passes().items():
        fields = ", ".join(f"{field.name}={field.default}" for field in option_fields(pass_class))
        rows.append([name, (inspect.getdoc(pass_class) or "").partition("\n")[0], fields])
    parts = [tabulate(rows, headers=["pass", "what it does", "options"], maxcolwidths=[None, 44, 56])]
    if registry.recipes():
        recipes = [(name, ",\n".join(map(str, registry.parse(text)))) for name, text in registry.recipes().items()]
        parts.append(tabulate(recipes, headers=["recipe", "passes"]))
    return "\n\n".join(parts)


def _build(reference: str) -> nn.Module:
    module, _, factory = reference.partition(":")
    if not module or not factory:
        raise biofx.ArgumentError(f"the model must be given as module:factory, got {reference!r}")
    sys.path.insert(0, "")  # the current folder: an installed command does not search it
    try:
        build = getattr(importlib.import_module(module), factory)
        model = build() if callable(build) and not isinstance(build, nn.Module) else build
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise biofx.ArgumentError(f"cannot make the model {reference!r}: {what}") from error
    if not isinstance(model, nn.Module):
        raise biofx.ArgumentError(f"{reference} returns an instance of {type(model).__name__}, not a torch.nn.Module")
    return model


if __name__ == "__main__":
    sys.exit(main())
