"""The matrix: real architectures × front ends × recipes × properties.

By default a fair sample: every model with one recipe on each front end that keeps its Python, and every second model
on the other, so that neighbours in the table get different recipes and every recipe meets every front end. All of them:

    BIOFX_MATRIX=full python -m pytest tests/test_architectures.py

The properties are in `differential`. Each model is transformed once for all of them. That front ends agree on signs is
tried on every third model by default.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
from torch.torch_version import TorchVersion

import biofx
import differential
from biofx.compiler import FRONTENDS
from differential import RECIPES, Case
from models.architectures import ARCHITECTURES
from models.pretrained import PARAMETRIZED, PRETRAINED

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
IS_FULL = os.environ.get("BIOFX_MATRIX") == "full"


class Cell(NamedTuple):
    """A place in the matrix."""

    model: str
    frontend: str
    recipe: str

    def __str__(self) -> str:
        return "-".join(self)


REFUSED = {
    ("export", "hf_swin"): "the forward of swin.encoder.layers.1.blocks.1 changes the attribute shift_size",
    ("export", "hf_mixtral"): "decides by the values of a tensor",  # loops over the experts that got tokens
}
if HAS_TRANSFORMERS and TorchVersion(version("transformers")) < (5, 24):  # on Python 3.10: layers skipped by a decision
    REFUSED |= {("export", f"hf_{name}"): "decides by the values of a" for name in ("bart", "whisper", "wav2vec2")}
"""What a front end refuses, by front end and model, with the reason that the error gives; no recipe works on these."""

CACHES = {"hf_" + name for name in ("gpt2", "llama", "t5", "mistral", "qwen", "bart", "whisper", "mamba", "mixtral")}
"""Models that return a cache, which `torch.export` cannot take apart, unless they are told not to."""

BUILDERS = {**ARCHITECTURES, **{f"hf_{name}": entry for name, entry in (PRETRAINED | PARAMETRIZED).items()}}
MODELS = list(BUILDERS)


def cells() -> list[Cell]:
    """All cells, or a sample in which recipes rotate over models and front ends."""
    rows = [(model, frontend) for model in MODELS for frontend in FRONTENDS if (frontend, model) not in REFUSED]
    if IS_FULL:
        return [Cell(*row, recipe) for row in rows for recipe in RECIPES]
    recipes, fronts = list(RECIPES), list(FRONTENDS)
    places = [(m, f, MODELS.index(m), fronts.index(f)) for m, f in rows]
    # Recipes move on by one for every second model, or an even number of recipes would leave some without an export.
    return [Cell(m, f, recipes[(i + i // 2 + j) % len(recipes)]) for m, f, i, j in places if f != "export" or i % 2]


def transformed(model: str, frontend: str, recipe: str) -> Case:
    """A cell's case."""
    if model.startswith("hf_") and not HAS_TRANSFORMERS:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    build, make = BUILDERS[model]
    tolerance = 1e-5 if model.startswith("hf_") else 1e-9  # they compute norms and softmax in float32
    inputs = make() | {"use_cache": False} if frontend == "export" and model in CACHES else make()
    return differential.transformed(build(), inputs, recipe, frontend, tolerance)


@pytest.fixture(scope="module", params=cells(), ids=str)
def case(request):
    return transformed(*request.param)


@pytest.mark.parametrize("check", differential.PROPERTIES, ids=lambda f: f.__name__.removeprefix("check_"))
def test_property(case, check):
    check(case)


@pytest.mark.parametrize("model", MODELS if IS_FULL else MODELS[1::3])
@pytest.mark.parametrize("recipe", ["dale", "everything"] if IS_FULL else ["dale"])
def test_front_ends_agree_on_signs(model, recipe):
    frontends = [frontend for frontend in FRONTENDS if (frontend, model) not in REFUSED]
    differential.check_same_weights([transformed(model, frontend, recipe) for frontend in frontends])


@pytest.mark.parametrize(("frontend", "model"), [key for key in REFUSED if key[0] in FRONTENDS])
def test_a_refusal_says_why(frontend, model):
    with pytest.raises((biofx.CaptureError, biofx.ArgumentError), match=REFUSED[frontend, model]):
        transformed(model, frontend, "split")
