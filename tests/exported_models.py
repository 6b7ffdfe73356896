"""What the tests of the front end "export" share: how a model is exported, and whether the result does the same."""

import copy
import io

import torch

import biofx
from biofx import passes
from biofx.base.isolation import split_inputs
from conftest import loss, tensors
from pipelines import NEUTRAL

EVERYTHING = [passes.SplitSynapses(3), passes.DalesPrinciple(balance=False), passes.FuzzyLearningRates()]


def x(*shape):
    return torch.randn(shape or (2, 4))


def export(model, inputs, recipe=NEUTRAL, **options):
    return biofx.transform(model, recipe, frontend="export", example_inputs=inputs, **options)


def export_for_graph(model, inputs):
    """With a pass that needs the graph, so that the Python of the model cannot take its place."""
    return export(model, inputs, [*NEUTRAL, passes.SynapticScaling()])


def call(model, inputs):
    args, kwargs = split_inputs(inputs)
    torch.manual_seed(3)
    return model(*args, **kwargs)


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def forms(bio):
    return [bio, copy.deepcopy(bio), reloaded(bio)]


def same(a, b):
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return type(a) is type(b) and all(torch.equal(p, q) for p, q in pairs)


def assert_same_in_both_modes(bio, model, inputs):
    """Compare outputs, gradients and buffers with the same random numbers, on copies of `bio` and `model`."""
    bio, model = copy.deepcopy(bio), copy.deepcopy(model)
    for training in (True, False, True):
        results = [call(m.train(training), inputs) for m in (bio, model)]
        assert same(*results)
        for result in results:
            loss(result).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(bio.get_parameter(name).grad, parameter.grad)
        for name, buffer in model.named_buffers():
            assert torch.equal(bio.get_buffer(name), buffer), name
