"""`python -m biofx`: look at passes, and at what they make of a model, from the shell."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Sequence

from tabulate import tabulate
from torch import nn

import biofx
from biofx import registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m biofx", description=biofx.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("passes", help="list all passes with their options, and all recipes")
    look = commands.add_parser("inspect", help="transform a model, and print what became of every weight")
    write = commands.add_parser("export", help="transform and fold a model, and write its state (.safetensors)")
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
    write.add_argument("path", help="a .safetensors file")
    options = parser.parse_args(arguments)
    try:
        if options.command == "passes":
            print(_passes())
            return 0
        bio = biofx.transform(_build(options.model), options.passes, seed=options.seed, exclude=options.exclude)
        if options.command == "inspect":
            print(biofx.summary(bio))
            if options.nodes:
                print("\n" + biofx.table(bio))
        else:
            biofx.export(bio, options.path)
            print(f"wrote {options.path}")
    except biofx.BiofxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _passes() -> str:
    rows = []
    for name, pass_class in registry.registered_passes().items():
        options = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(pass_class))
        rows.append([name, (inspect.getdoc(pass_class) or "").partition("\n")[0], options])
    parts = [tabulate(rows, headers=["pass", "what it does", "options"], maxcolwidths=[None, 44, 56])]
    if registry.recipes():
        parts.append(tabulate(registry.recipes().items(), headers=["recipe", "passes"], maxcolwidths=[None, 100]))
    return "\n\n".join(parts)


def _build(reference: str) -> nn.Module:
    module, colon, factory = reference.partition(":")
    if not colon:
        raise biofx.ArgumentError(f"the model must be given as module:factory, got {reference!r}")
    sys.path.insert(0, "")  # as `python -m` does not search the current folder when it is installed
    try:
        build = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise biofx.ArgumentError(f"cannot find the model {reference!r}: {error}") from error
    model = build() if callable(build) and not isinstance(build, nn.Module) else build
    if not isinstance(model, nn.Module):
        raise biofx.ArgumentError(f"{reference} returns an instance of {type(model).__name__}, not a torch.nn.Module")
    return model


if __name__ == "__main__":
    sys.exit(main())
