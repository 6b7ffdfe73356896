"""What the tests of training share: a network that learns digits, optimizers, and all that a run leaves behind."""

import copy

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import biofx
from biofx import passes
from models.small import mlp

GAINS = [passes.FuzzyLearningRates(nu=0.4, distribution="lognormal")]
EVERYTHING = [
    passes.SplitSynapses(2),
    passes.FuzzyLearningRates(distribution="temporal", every=2),
    passes.VolumeDependentLearningRates(base_lr=0.9),
    passes.Crystallize(),
    passes.Rejuvenate(dre=6.0),
    passes.SynapticScaling(on="weight"),
    passes.L1Regularization(1e-4),
    passes.ExponentiatedGradient(),
]
ACTIVITY = [
    passes.FuzzyLearningRates(distribution="activity", every=2),
    passes.SynapticScaling(),
    passes.Rejuvenate(rule="threshold"),
]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.003, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.003, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.003, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.003, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.003),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.003),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.02),
}


def digits(dtype=torch.float64):
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=dtype), torch.tensor(data.target)


IMAGES, LABELS = digits()


def network():
    torch.manual_seed(1)
    return mlp(64, 32, 10).double()


def train(model, optimizer, steps, batch=64, start=0):
    for step in range(start, start + steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(LABELS)
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[rows]), LABELS[rows]).backward()
        optimizer.step()


def displacements(optimizer_of, steps, pipeline=GAINS):
    """Displacement of every weight in the plain and in the transformed model, and the gain."""
    plain = network()
    bio = biofx.transform(plain, pipeline)
    plain_optimizer, optimizer = optimizer_of(plain.parameters()), optimizer_of(bio.parameters())
    biofx.attach(bio, optimizer)
    before = copy.deepcopy(plain)
    train(plain, plain_optimizer, steps)
    train(bio, optimizer, steps)
    for name, site in biofx.weight_sites(bio).items():
        start = before.get_parameter(name).detach()
        yield plain.get_parameter(name).detach() - start, site.raw.detach() - start, site.gain


def start(pipeline=EVERYTHING, name="adamw", model=None):
    bio = biofx.transform(network() if model is None else model, pipeline)
    optimizer = OPTIMIZERS[name](bio.parameters())
    return bio, optimizer, biofx.attach(bio, optimizer)


def states(bio, optimizer):
    tensors = {f"model.{k}": v for k, v in bio.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def assert_same_states(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name
