"""Command line: `python -m biofx` lists passes, and transforms, inspects and exports a model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import fx, nn

import biofx
from biofx.base.randomness import generator
from biofx.output.export import PROGRAMS, WEIGHTS
from biofx.rewrite import registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except biofx.BiofxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m biofx", description=biofx.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    catalogue = commands.add_parser("passes", help="list all passes with their options, and all recipes")
    look = commands.add_parser("inspect", help="transform a model, and print its summary")
    write = commands.add_parser("export", help="transform and fold a model, and write it to a file")
    for command, run in ((catalogue, _passes), (look, _inspect), (write, _export)):
        command.set_defaults(run=run)
    for command in (look, write):
        command.add_argument(
            "model", metavar="module:factory", help="a callable without arguments that returns the model"
        )
        command.add_argument("--passes", required=True, help="pipeline string, or the name of a recipe")
        command.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: 0)")
        command.add_argument(
            "--exclude", action="append", default=[], metavar="GLOB", help="leave matching weights alone"
        )
        command.add_argument(
            "--input",
            action="append",
            type=_input,
            metavar="2,3,224,224:float32",
            help="sizes and dtype of an example input of the model (default: float32); repeat it for each input; "
            f"export needs it for {' and '.join(PROGRAMS)}",
        )
    look.add_argument("--nodes", action="store_true", help="also print the inserted nodes")
    write.add_argument("path", help=f"a file; its suffix selects the format: {', '.join([*PROGRAMS, *WEIGHTS])}")
    return parser


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


def _transformed(options: argparse.Namespace) -> fx.GraphModule:
    return biofx.transform(
        _build(options.model),
        options.passes,
        example_inputs=_inputs(options),
        seed=options.seed,
        exclude=options.exclude,
    )


def _inputs(options: argparse.Namespace) -> tuple[torch.Tensor, ...] | None:
    return None if options.input is None else tuple(options.input)


def _inspect(options: argparse.Namespace) -> str:
    bio = _transformed(options)
    return biofx.summary(bio) + (f"\n\n{biofx.table(bio)}" if options.nodes else "")


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
        fields = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(pass_class))
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
