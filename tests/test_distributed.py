"""Several processes over gloo: rules do the same on every rank, and the same as one process with the whole batch."""

import contextlib
import copy
import functools
import os
import re
import runpy
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import biofx
from biofx import passes
from biofx.base.shards import is_sharded, local
from biofx.training import attachment
from models.small import mlp

OPTIONS = {
    "fuzzy-learning-rates": {"distribution": "activity", "every": 4},
    "volume-dependent-learning-rates": {"base_lr": 0.9},
    "rejuvenate": {"dre": 6.0},
    "continual-backprop": {"replacement_rate": 0.02, "maturity": 3},
    "synaptic-scaling": {"every": 2},
    "l1-regularization": {"strength": 1e-4},
}
STEPS = 20
OBSERVED = (".seen", ".active")  # what observers saw since the last step, on a share or the whole
DALE, MIRRORED, INTERNEURONS = "dales-principle", "mirror-units", "inhibitory-interneurons"  # exclude each other


def everything(*without: str, **other_options) -> list[passes.Pass]:
    """All passes of biofx, but for those that the others exclude."""
    options = {**OPTIONS, **other_options}
    own = {name: cls for name, cls in passes.registered_passes().items() if cls.__module__.startswith("biofx.")}
    return [cls(**options.get(name, {})) for name, cls in own.items() if name not in without]


def start(work, ranks: int, *args) -> None:
    """Call a function of rank, number of ranks, port and other arguments in as many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked processes start in no time, but must not be used where threads for a GPU run.
    method = "spawn" if torch.accelerator.is_available() else "fork"
    mp.start_processes(work, args=(ranks, port, *args), nprocs=ranks, start_method=method)


def spawn(function, ranks: int, folder) -> list:
    """What a function of rank and number of ranks returns on each rank."""
    start(_work, ranks, function, str(folder))
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]


def _work(rank: int, ranks: int, port: int, function, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks), f"{folder}/{rank}.pt")
    dist.barrier()  # the first process holds what others may still be setting groups up with
    dist.destroy_process_group()


# --- Data parallel


DATA_PARALLEL = {  # the optimizer, the passes that are left out, and what is attached
    "SGD": ("SGD", (MIRRORED, INTERNEURONS), "wrapper"),
    "attached before": ("AdamW", (DALE, INTERNEURONS, "group-units"), "before"),
    "attached after": ("AdamW", (DALE, MIRRORED, "split-synapses"), "after"),
}


def train_data_parallel(name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Train on a share of every batch, in two micro-batches."""
    optimizer_name, without, attached = DATA_PARALLEL[name]
    seed = rank if attached == "wrapper" else 0  # wrapping makes ranks equal
    torch.manual_seed(seed)
    bio = biofx.transform(mlp(6, 8, 8, 4).double(), everything(*without), seed=seed, verify=False)
    optimizer = getattr(torch.optim, optimizer_name)(bio.parameters(), lr=0.01)
    if attached == "before":
        biofx.attach(bio, optimizer)
    model = DistributedDataParallel(bio) if ranks > 1 else bio
    if attached != "before":
        biofx.attach(model if attached == "wrapper" else bio, optimizer)
    torch.manual_seed(1)
    labels = torch.arange(32) % 4
    for batch in torch.randn(STEPS, 32, 6, dtype=torch.float64):
        optimizer.zero_grad()
        for images, own in zip(batch.chunk(2), labels.chunk(2), strict=True):
            F.cross_entropy(model(images.chunk(ranks)[rank]), own.chunk(ranks)[rank]).backward()
        optimizer.step()
    if ranks > 1:
        assert not model.broadcast_buffers  # there are no others than those of rules
        assert not biofx.fold(bio)._forward_pre_hooks  # by which the wrapper was found
    return bio.state_dict()


def train_all_data_parallel(rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train_data_parallel(name, rank, ranks) for name in DATA_PARALLEL}


def test_data_parallel_ranks_agree_with_one_process(tmp_path):
    trained = train_all_data_parallel(0, 1)  # before others start, which are forked and know its tables of noise
    first, second = spawn(train_all_data_parallel, 2, tmp_path)
    for name, alone in trained.items():
        for key, value in alone.items():
            assert torch.equal(first[name][key], second[name][key]), f"{name}: {key}"
            if not key.endswith(OBSERVED):  # sums of a whole batch, or its mean over ranks
                torch.testing.assert_close(
                    first[name][key], value, rtol=1e-7, atol=1e-10, msg=lambda m, k=key, n=name: f"{n}: {k}: {m}"
                )
        assert sum(int(value) for key, value in alone.items() if key.endswith(".replaced")) > 0


def run_example(rank: int, ranks: int, port: int, folder: str) -> None:
    """What torchrun does."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    examples = Path(__file__).parents[1] / "examples"
    sys.path.insert(0, str(examples))
    sys.argv = ["data_parallel.py", "--steps", "11"]
    with open(f"{folder}/{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        runpy.run_path(str(examples / "data_parallel.py"), run_name="__main__")


def test_the_example_shows_that_ranks_agree_with_one_process(tmp_path):
    start(run_example, 2, str(tmp_path))
    shown = (tmp_path / "0.txt").read_text()
    assert re.search(r"^2 ranks, a share of each batch .*% +[\d.]+e-1\d from one process$", shown, re.MULTILINE)
    assert re.search(r"^one rank and another +0$", shown, re.MULTILINE)
    assert (tmp_path / "1.txt").read_text() == ""


# --- Shards


WHOLE = [name for name, rule in passes.registered_passes().items() if rule.moment and not rule.works_on_shards]
SPLIT = [passes.SplitSynapses(2), passes.FuzzyLearningRates()]
UNSTORED = [passes.SplitSynapses(2), passes.FuzzyLearningRates(dtype="unstored")]
IN_BLOCKS = {
    "fuzzy-learning-rates": {"distribution": "weight_adaptive", "every": 2},
    "rejuvenate": {"dre": 14.0, "rule": "threshold"},
    "dales-principle": {"constraint": "softplus"},
}


@dataclass(frozen=True)
class Sharded:
    """A way to shard a model.

    Attributes:
        pipeline: its passes.
        optimizer: the name of the optimizer.
        sizes: of its layers.
        blocks: whether each layer is sharded separately.
        placed: whether weights are cut along their connections, not their synapses.
        attached: whether rules act.
    """

    pipeline: list[passes.Pass]
    optimizer: str = "AdamW"
    sizes: tuple[int, ...] = (6, 12, 6, 6)
    blocks: bool = False
    placed: bool = True
    attached: bool = True


SHARDED = {
    "an empty shard": Sharded(everything(MIRRORED, INTERNEURONS, *WHOLE), placed=False, sizes=(6, 10, 6, 4)),
    "uneven shards": Sharded(everything(MIRRORED, DALE, "split-synapses", *WHOLE), "SGD", sizes=(6, 10, 8, 4)),
    "mirrored units": Sharded(everything(DALE, INTERNEURONS, "group-units", *WHOLE)),
    "blocks": Sharded(
        everything(MIRRORED, INTERNEURONS, "group-units", "synaptic-scaling", *WHOLE, **IN_BLOCKS), blocks=True
    ),
    "unstored": Sharded(UNSTORED, "SGD", blocks=True),
    "not attached": Sharded(SPLIT, "SGD", blocks=True, attached=False),
}


TRAINED = [*SHARDED]


@functools.cache  # which forked processes know
def transformed(name: str):
    torch.manual_seed(0)
    return biofx.transform(mlp(*SHARDED[name].sizes).double(), SHARDED[name].pipeline, verify=False)


def start_sharded(name: str, ranks: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case, bio = SHARDED[name], copy.deepcopy(transformed(name))
    if ranks > 1:
        options = {"mesh": init_device_mesh("cpu", (ranks,))}
        options |= {"shard_placement_fn": biofx.shard_placement(bio)} if case.placed else {}
        for block in bio.children() if case.blocks else ():
            if [*block.parameters()]:
                fully_shard(block, **options)
        fully_shard(bio, **options)
    optimizer = getattr(torch.optim, case.optimizer)(bio.parameters(), lr=0.01)
    if case.attached:
        biofx.attach(bio, optimizer)
    return bio, optimizer


def train_sharded(name: str, rank: int, ranks: int, bio, optimizer, steps=range(4)) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(6, 12, SHARDED[name].sizes[0], dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % SHARDED[name].sizes[-1]
    for step in steps:
        optimizer.zero_grad()
        F.cross_entropy(bio(batches[step].chunk(ranks)[rank]), labels.chunk(ranks)[rank]).backward()
        optimizer.step()


def whole(bio) -> dict[str, torch.Tensor]:
    """The state of a model, in whole tensors that nobody changes any more."""
    return {n: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for n, x in bio.state_dict().items()}


def train_all_sharded(rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    results = {}
    for name in TRAINED:
        bio, optimizer = start_sharded(name, ranks)
        train_sharded(name, rank, ranks, bio, optimizer)
        results[name] = whole(bio)
        for key, x in bio.state_dict().items() if ranks > 1 else ():
            results[name, key] = tuple(x.to_local().shape if hasattr(x, "to_local") else x.shape)
    return results


def test_rules_do_on_shards_what_they_do_on_whole_weights(tmp_path):
    trained = train_all_sharded(0, 1)
    for rank, found in enumerate(spawn(train_all_sharded, 3, tmp_path)):
        for name in TRAINED:
            for key, value in trained[name].items():
                if not key.endswith(OBSERVED):
                    torch.testing.assert_close(
                        found[name][key], value, rtol=1e-7, atol=1e-9, msg=lambda m, k=key, n=name: f"{n}: {k}: {m}"
                    )
                if key.endswith(".gain") and SHARDED[name].attached:  # no rank holds a whole one
                    assert found[name, key] == found[name, key.replace(".gain", ".weight")] != value.shape
        assert found["an empty shard", "0.weight_synapses.gain"][0] == (1, 1, 0)[rank]
        assert found["blocks", "0.weight_synapses.weight"] == (2, 4, 6)
    assert sum(int(value) for key, value in trained["blocks"].items() if key.endswith(".replaced")) > 0


def saved_and_loaded(rank: int, ranks: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Train three steps, save and train on; and load into another model, and train that on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    bio, optimizer = start_sharded("blocks", ranks)
    train_sharded("blocks", rank, ranks, bio, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(bio, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train_sharded("blocks", rank, ranks, bio, optimizer, range(3, 6))
    again, optimizer = start_sharded("blocks", ranks)
    fresh = whole(again)
    model_state, optimizer_state = get_state_dict(again, optimizer)  # makes a step, which trains nothing
    untouched = whole(again)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(again, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train_sharded("blocks", rank, ranks, again, optimizer, range(3, 6))
    return {"fresh": fresh, "untouched": untouched, "on": whole(bio), "loaded": whole(again)}


def error_of(function) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - whichever it is, another rank waits for this one
        return f"{type(error).__name__}: {error}"
    return "no error"


@dataclass(frozen=True)
class Halve(passes.Pass):
    """A rule that was not written for shards."""

    name = "halve"
    slot = passes.Slot.HOOK
    moment = passes.Moment.SCALING

    def rewrite(self, site, edit):
        pass

    def at_step(self, weights):
        for weight in weights:
            weight.assign(weight.value / weight.value.std())


SHARDED["detached"] = Sharded(SPLIT, "SGD")
SHARDED["failed attach"] = Sharded(SPLIT, "SGD", attached=False)
SHARDED["observed blocks"] = Sharded([passes.SynapticScaling()], blocks=True)
SHARDED["another rule"] = Sharded([Halve()])


def check_a_failed_attach(ranks: int) -> None:
    """Gains that were cut are whole again, and a second attempt cuts them."""
    bio, optimizer = start_sharded("failed attach", ranks)
    gain = bio.get_buffer("0.weight_synapses.gain")
    with mock.patch.object(attachment, "rectify_", side_effect=RuntimeError("late")):
        assert error_of(lambda: biofx.attach(bio, optimizer)) == "RuntimeError: late"
    assert bio.get_buffer("0.weight_synapses.gain") is gain
    biofx.attach(bio, optimizer)
    assert is_sharded(bio.get_buffer("0.weight_synapses.gain"))


def fold_of_sharded(bio, name: str) -> str:
    """Fold a sharded model by the way that the refusal names; return the refusal."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    refusal = error_of(lambda: biofx.fold(bio))
    new = copy.deepcopy(transformed(name))
    new.load_state_dict(get_model_state_dict(bio, options=StateDictOptions(full_state_dict=True)))
    x = torch.ones(2, 6).double()
    torch.testing.assert_close(biofx.fold(new)(x), bio(x), rtol=1e-10, atol=1e-12)
    bio.reshard()
    return refusal


def refusals(rank: int, ranks: int) -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    check_a_failed_attach(ranks)
    found = {name: error_of(lambda n=name: start_sharded(n, ranks)) for name in ("observed blocks", "another rule")}
    bio, optimizer = start_sharded("mirrored units", ranks)
    train_sharded("mirrored units", rank, ranks, bio, optimizer, range(1))
    found["folded"] = fold_of_sharded(bio, "mirrored units")
    before = whole(bio)
    bio(torch.ones(2, 6).double()).sum().backward()
    bio.get_parameter("0.weight").grad.to_local().view(-1)[:1] = torch.nan if rank == 1 else 1.0
    found["not finite"] = error_of(optimizer.step)
    with torch.no_grad():
        bio(torch.ones(2, 6).double())
    found["unsharded"] = error_of(optimizer.step)
    bio.reshard()
    assert all(torch.equal(x, before[name]) for name, x in whole(bio).items() if not name.endswith(OBSERVED))
    train_sharded("mirrored units", rank, ranks, bio, optimizer, range(1))
    optimizer = torch.optim.SGD(copy.deepcopy(transformed("mirrored units")).parameters())
    found["made before"] = error_of(lambda: biofx.attach(bio, optimizer))
    flat = FullyShardedDataParallel(copy.deepcopy(transformed("mirrored units")), device_id=torch.device("cpu"))
    found["flattened"] = error_of(lambda: biofx.attach(flat, torch.optim.SGD(flat.parameters())))
    return found


def detached(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Without an optimizer that is attached, gains act in the backward pass, as on one process."""
    bio, optimizer = start_sharded("detached", ranks)
    biofx.detach(bio)
    train_sharded("detached", rank, ranks, bio, optimizer)
    return whole(bio)


SMOOTH = "softplus" if torch.__version__ >= (2, 13) else "abs"  # before, DTensors had no softplus
TENSOR_PARALLEL = {
    "split-synapses,dales-principle,fuzzy-learning-rates,crystallize,rejuvenate{dre=6.0}": True,
    "split-synapses,dales-principle{constraint=abs},l1-regularization": True,
    "split-synapses,synaptic-scaling,fuzzy-learning-rates{distribution=activity,every=2}": True,
    "synaptic-scaling{on=weight}": True,
    f"split-synapses,dales-principle{{constraint={SMOOTH}}},fuzzy-learning-rates{{dtype=uint8}}": False,
    "split-synapses,fuzzy-learning-rates{dtype=unstored},volume-dependent-learning-rates": False,
}


def tensor_parallel(rank: int, ranks: int, pipeline: str) -> dict[str, torch.Tensor]:
    """Train with the first weight cut along its postsynaptic axis, and the others along their presynaptic axis."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    bio = biofx.transform(mlp(6, 8, 8, 4).double(), pipeline, verify=False)
    batches = torch.randn(4, 8, 6, dtype=torch.float64)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for name, module in bio.named_modules():
            for key, parameter in [*module.named_parameters(recurse=False)]:
                axis = (not name.startswith("0")) + parameter.dim() - 2
                cut = Shard(axis) if name.endswith("_synapses") else Replicate()
                module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [cut])))
        batches = [distribute_tensor(batch, mesh, [Replicate()]) for batch in batches]
    optimizer = (torch.optim.AdamW if TENSOR_PARALLEL[pipeline] else torch.optim.SGD)(bio.parameters(), lr=0.01)
    if TENSOR_PARALLEL[pipeline]:
        biofx.attach(bio, optimizer)
    for batch in batches:
        optimizer.zero_grad()
        bio(batch).square().mean().backward()
        optimizer.step()
    return whole(bio)


STYLED = [
    "split-synapses,dales-principle,fuzzy-learning-rates,crystallize,rejuvenate{dre=6.0}",
    "fuzzy-learning-rates{distribution=weight_adaptive},rejuvenate{dre=6.0},l1-regularization",
    "volume-dependent-learning-rates,dales-principle{constraint=abs}",
    "inhibitory-interneurons,exponentiated-gradient",
]


class TiedReader(nn.Module):
    """Layers for both styles: tokens in and out by one weight, and two linear layers between."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, tokens):
        return self.out(self.down(torch.relu(self.up(self.tokens(tokens)))))


def styled(rank: int, ranks: int, pipeline: str) -> dict[str, torch.Tensor]:
    """Train a model that was cut by the styles of PyTorch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    torch.manual_seed(0)
    batches = torch.randint(6, (4, 8))
    bio = biofx.transform(TiedReader().double(), pipeline, example_inputs=batches[0], verify=False)
    if ranks > 1:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "out": ColwiseParallel(output_layouts=Replicate())}
        plan["tokens"] = RowwiseParallel(input_layouts=Replicate())
        order = [*bio.state_dict()]
        biofx.parallelize(bio, init_device_mesh("cpu", (ranks,)), plan)
        assert [*bio.state_dict()] == order
        assert all(is_sharded(parameter) for parameter in bio.parameters())
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(bio(batch), batch.roll(1)).backward()
        optimizer.step()
    biofx.verify(bio)
    with torch.no_grad():
        local(bio.down.weight_synapses.weight).mul_(-1)
    is_signed = "dales-principle," in pipeline or "interneurons" in pipeline  # by other means than magnitudes
    assert error_of(lambda: biofx.verify(bio)).startswith("VerificationError" if is_signed else "no error")
    return whole(bio)


def refused_styles(rank: int, ranks: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, batch = init_device_mesh("cpu", (ranks,)), torch.arange(6)
    bio = biofx.transform(TiedReader(), "split-synapses", example_inputs=batch)
    observed = biofx.transform(TiedReader(), "synaptic-scaling", example_inputs=batch)
    attached = biofx.transform(TiedReader(), "fuzzy-learning-rates", example_inputs=batch)
    optimizer = torch.optim.SGD(attached.parameters())
    biofx.attach(attached, optimizer)
    by_torch = {"up": ColwiseParallel()}, {"down": RowwiseParallel()}
    pairs = zip((bio, attached), by_torch, strict=True)
    errors = [error_of(lambda m=m, p=p: parallelize_module(m, mesh, p)) for m, p in pairs]
    errors += [error_of(lambda m=m: biofx.parallelize(m, mesh, by_torch[0])) for m in (observed, attached)]
    plain = parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallel())
    errors.append(error_of(lambda: biofx.transform(plain, "crystallize")))
    as_equal, uneven = (biofx.transform(mlp(6, 5, 3), "split-synapses") for _ in range(2))
    before, own = [*bio.parameters()], [*uneven.parameters()]
    biofx.parallelize(as_equal, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    refused = error_of(lambda: as_equal(torch.ones(2, 6)))  # by PyTorch, which takes local tensors for equal parts
    assert refused.startswith("RuntimeError: "), refused
    biofx.parallelize(uneven, mesh, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    uneven(torch.ones(2, 6)).sum().backward()
    errors.append(error_of(lambda: biofx.attach(uneven, torch.optim.SGD([*own, *uneven.parameters()]))))
    errors.append(error_of(lambda: biofx.parallelize(bio, init_device_mesh("cpu", (ranks, 1)), by_torch[0])))
    assert all(a is b for a, b in zip(before, bio.parameters(), strict=True))
    return [
        *errors,
        error_of(lambda: biofx.parallelize(bio, mesh, {"out": ColwiseParallel(), "tokens": by_torch[0]["up"]})),
    ]


REFUSED_STYLES = [
    r"weight_synapses.weight of Linear is stored by its synapses.* biofx.parallelize\(bio, mesh, plan\)",
    r"weight of Linear is stored by its synapses, which a DTensor would replace.* biofx.parallelize",
    "parallelize: synaptic-scaling needs the graph.* let all parameters and the inputs be DTensors",
    r"parallelize: an attached optimizer .* biofx.detach\(bio\), parallelize",
    r"weight is a DTensor; transform the original model, then cut the result: biofx.parallelize\(bio, mesh, plan\)",
    "attach: SGD holds weights as they were before biofx.parallelize cut them; build it from bio.parameters",
    r"parallelize: .* has 2 dimensions; give the one of tensor parallelism, such as mesh\['tp'\]",
    "parallelize: weight is tied, and the plan cuts it in several ways",
]


def use_styles(rank: int, ranks: int):
    return {pipeline: styled(rank, ranks, pipeline) for pipeline in STYLED}, refused_styles(rank, ranks)


def test_rules_under_tensor_parallelism_do_as_on_one(tmp_path):
    alone = {pipeline: styled(0, 1, pipeline) for pipeline in STYLED}
    for found, errors in spawn(use_styles, 2, tmp_path):
        for pipeline, state in alone.items():
            for name, value in state.items():
                torch.testing.assert_close(
                    found[pipeline][name], value, rtol=1e-7, atol=1e-10, msg=lambda m, k=(pipeline, name): f"{k}: {m}"
                )
        for message, error in zip(REFUSED_STYLES, errors, strict=True):
            assert re.match(f"ArgumentError: {message}", error), error


def all_in_parallel(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    return {
        f"{pipeline}: {name}": value
        for pipeline in TENSOR_PARALLEL
        for name, value in tensor_parallel(rank, ranks, pipeline).items()
    }


def use_shards(rank: int, ranks: int, folder: str):
    without_optimizer, in_parallel = detached(rank, ranks), all_in_parallel(rank, ranks)
    return saved_and_loaded(rank, ranks, folder), refusals(rank, ranks), without_optimizer, in_parallel


def test_what_is_sharded_is_saved_detached_or_refused(tmp_path):
    alone, one = detached(0, 1), all_in_parallel(0, 1)
    transformed("blocks"), transformed("mirrored units"), transformed("failed attach")
    for saved, errors, gains, parallel in spawn(
        functools.partial(use_shards, folder=str(tmp_path / "saved")), 2, tmp_path
    ):
        assert all(torch.equal(x, saved["fresh"][name]) for name, x in saved["untouched"].items())
        assert all(torch.equal(x, saved["on"][name]) for name, x in saved["loaded"].items())
        for name, value in alone.items():
            torch.testing.assert_close(gains[name], value, rtol=1e-7, atol=1e-10)
        for name, value in one.items():
            if not name.endswith(OBSERVED):
                torch.testing.assert_close(parallel[name], value, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: n + m)
        for name, message in {
            "observed blocks": r"ArgumentError: attach: 0 is sharded as a block .* fully_shard\(bio\)",
            "another rule": "ArgumentError: attach: 0.weight is sharded, and halve acts on whole weights: .* "
            "DistributedDataParallel, .* without halve.* works_on_shards",
            "folded": r"ArgumentError: fold: .* is sharded, so transform the original .*full_state_dict=True",
            "not finite": "LifecycleError: 0.weight: its gradient is not finite",
            "unsharded": r"LifecycleError: .* is whole on every rank.* call reshard\(\)",
            "flattened": r"ArgumentError: .* FullyShardedDataParallel; it flattens .*fully_shard",
            "made before": "ArgumentError: .* holds no weight of this model .* after fully_shard",
        }.items():
            assert re.match(message, errors[name]), f"{name}: {errors[name]}"


# --- Meshes of two dimensions

UNEQUAL = 10 if torch.__version__ >= (2, 13) else 8  # PyTorch 2.9 mixes up unequal parts of parts
SIGNED = "split-synapses,dales-principle,fuzzy-learning-rates,crystallize,rejuvenate{dre=6.0}"
ADAPTIVE = "dales-principle,fuzzy-learning-rates{distribution=weight_adaptive,every=2},rejuvenate{dre=6.0}"
TWO_DIMENSIONS = {  # by the name of the mesh's last dimension, the passes and the sizes of layers
    "tp": {
        SIGNED: (6, 8, 8, 4),
        ADAPTIVE: (6, UNEQUAL, 6, 4),
        "volume-dependent-learning-rates,dales-principle{constraint=abs},l1-regularization": (6, UNEQUAL, 6, 4),
        "inhibitory-interneurons,exponentiated-gradient": (6, 8, 8, 4),
    },
    "shard": {SIGNED: (6, 8, 8, 4), "synaptic-scaling,crystallize,rejuvenate{dre=6.0}": (6, 10, 6, 4)},
}


@functools.cache  # which forked processes know
def for_two_dimensions(last: str, pipeline: str):
    torch.manual_seed(0)
    return biofx.transform(mlp(*TWO_DIMENSIONS[last][pipeline]).double(), pipeline, verify=False)


def start_in_two_dimensions(last: str, pipeline: str, ranks: int):
    """Cut a model by tensor parallelism and `fully_shard`, or by `fully_shard` with replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    bio, share, shares = copy.deepcopy(for_two_dimensions(last, pipeline)), 0, 1
    if ranks > 1:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", last))
        share, shares = (mesh.get_local_rank("dp"), 2) if last == "tp" else (mesh.get_rank(), 4)
        if last == "tp":
            biofx.parallelize(bio, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        options = {"mesh": mesh["dp"] if last == "tp" else mesh, "shard_placement_fn": biofx.shard_placement(bio)}
        for block in [bio.get_submodule("4")] if last == "tp" else ():
            fully_shard(block, **options)
        fully_shard(bio, **options)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.05, momentum=0.9)
    biofx.attach(bio, optimizer)
    return bio, optimizer, share, shares


def train_in_two_dimensions(bio, optimizer, share: int, shares: int, steps=range(4)) -> None:
    batches = torch.randn(8, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for step in steps:
        optimizer.zero_grad()
        labels = torch.arange(12).chunk(shares)[share] % 4
        F.cross_entropy(bio(batches[step].chunk(shares)[share]), labels).backward()
        optimizer.step()


def in_two_dimensions(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Train, and then without an optimizer that is attached."""
    results = {}
    for last, pipelines in TWO_DIMENSIONS.items():
        for pipeline in pipelines:
            started = start_in_two_dimensions(last, pipeline, ranks)
            train_in_two_dimensions(*started)
            biofx.verify(started[0])
            biofx.detach(started[0])
            train_in_two_dimensions(*started, range(4, 6))
            results |= {f"{last}: {pipeline}: {name}": value for name, value in whole(started[0]).items()}
    return results


def resumed_in_two_dimensions(rank: int, ranks: int, folder: str) -> list[dict[str, torch.Tensor]]:
    """Save under tensor parallelism, train on, and train on from the files, there and with replicas."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    started = start_in_two_dimensions("tp", SIGNED, ranks)
    train_in_two_dimensions(*started, range(3))
    model, optimizer = get_state_dict(*started[:2])
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    train_in_two_dimensions(*started, range(3, 6))
    results = [whole(started[0])]
    for last in TWO_DIMENSIONS:
        started = start_in_two_dimensions(last, SIGNED, ranks)
        model, optimizer = get_state_dict(*started[:2])
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(*started[:2], model_state_dict=model, optim_state_dict=optimizer)
        train_in_two_dimensions(*started, range(3, 6))
        results.append(whole(started[0]))
    return results


def refused_in_two_dimensions(rank: int, ranks: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    first, later = (biofx.transform(mlp(6, 8, 8, 4), "fuzzy-learning-rates", verify=False) for _ in range(2))
    fully_shard(first, mesh=mesh["dp"])
    biofx.parallelize(later, mesh["tp"], plan)
    optimizer = torch.optim.SGD(later.parameters())
    biofx.attach(later, optimizer)
    fully_shard(later, mesh=mesh["dp"])
    later(torch.ones(2, 6)).sum().backward()
    errors = [error_of(lambda: biofx.parallelize(first, mesh["tp"], plan)), error_of(optimizer.step)]
    biofx.detach(later)
    optimizer = torch.optim.SGD(later.parameters())
    optimizer.zero_grad()
    biofx.attach(later, optimizer)  # gains follow their weights, which were cut again
    later(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    unequal = biofx.transform(mlp(6, 10, 6, 4), "fuzzy-learning-rates", verify=False)
    biofx.parallelize(unequal, mesh["tp"], plan)
    fully_shard(unequal, mesh=mesh["dp"])
    return [*errors, error_of(lambda: biofx.attach(unequal, torch.optim.SGD(unequal.parameters())))]


def use_two_dimensions(rank: int, ranks: int, folder: str):
    return (
        in_two_dimensions(rank, ranks),
        resumed_in_two_dimensions(rank, ranks, folder),
        refused_in_two_dimensions(rank, ranks),
    )


@pytest.mark.filterwarnings("ignore:SGD trains a model of biofx without its rules")  # after they were detached
def test_rules_on_meshes_of_two_dimensions_do_as_on_one(tmp_path):
    alone = in_two_dimensions(0, 1)
    found = spawn(functools.partial(use_two_dimensions, folder=str(tmp_path / "saved")), 4, tmp_path)
    assert sum(int(value) for key, value in alone.items() if key.endswith(".replaced")) > 0
    for trained, (on, *resumed), errors in found:
        for name, value in alone.items():
            if not name.endswith(OBSERVED):
                torch.testing.assert_close(
                    trained[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert all(torch.equal(value, resumed[0][name]) for name, value in on.items())
        for name, value in on.items():
            torch.testing.assert_close(resumed[1][name], value, rtol=1e-12, atol=1e-12)
        assert re.match(r"ArgumentError: parallelize: weights are cut over another mesh already", errors[0]), errors[0]
        assert re.match(r"LifecycleError: 0.weight is another tensor .* or fully_shard; detach", errors[1]), errors[1]
        mixed_up = "ArgumentError: attach: PyTorch .* mixes up the unequal parts of 0.weight .* 4 divides"
        assert re.match("no error" if UNEQUAL == 10 else mixed_up, errors[2]), errors[2]
