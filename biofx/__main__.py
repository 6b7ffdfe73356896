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
from torch import nn

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
    look.add_argument("--nodes", action="store_true", help="also print the inserted nodes")
    write.add_argument("path", help=f"a file; its suffix selects the format: {', '.join([*PROGRAMS, *WEIGHTS])}")
    write.add_argument(
        "--example-shape",
        action="append",
        type=_shape,
        metavar="1x3x32x32",
        help=f"shape of an input of the model, needed for {' and '.join(PROGRAMS)}; repeat it for each input",
    )
    return parser


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be sizes joined by x, such as 1x3x32x32, got {text!r}")
    return tuple(map(int, text.split("x")))


def _inspect(options: argparse.Namespace) -> str:
    bio = biofx.transform(_build(options.model), options.passes, seed=options.seed, exclude=options.exclude)
    return biofx.summary(bio) + (f"\n\n{biofx.table(bio)}" if options.nodes else "")


def _export(options: argparse.Namespace) -> str:
    inputs = None
    if options.example_shape is not None:
        inputs = tuple(
            torch.randn(shape, generator=generator(0, "example input", index))
            for index, shape in enumerate(options.example_shape)
        )
    elif Path(options.path).suffix in PROGRAMS:
        raise biofx.ArgumentError(
            f"{options.path} needs the shape of the model's input, such as --example-shape 1x3x32x32"
        )
    bio = biofx.transform(
        _build(options.model), options.passes, example_inputs=inputs, seed=options.seed, exclude=options.exclude
    )
    biofx.export(bio, options.path, inputs)
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
