"""Lightning trains a transformed model with one callback, or with one call of attach."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import biofx
from biofx import passes

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

from biofx.integrations.lightning import BiofxCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PIPELINE = [
    passes.SplitSynapses(2),
    passes.FuzzyLearningRates(distribution="temporal", every=2),
    passes.Crystallize(),
    passes.Rejuvenate(),
]
STEPS = 6  # in an epoch


class Digits(lightning.LightningModule):
    def __init__(self, attaches=False, pipeline=PIPELINE):
        super().__init__()
        torch.manual_seed(0)
        self.net = biofx.transform(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), pipeline)
        self.lr, self.attaches = 0.01, attaches

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.attaches:
            biofx.attach(self.net, optimizer)
        return optimizer


def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(STEPS * 4, 8, generator=generator), torch.arange(STEPS * 4) % 3), 4)


def trainer(folder, *callbacks, epochs=3, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks],
        default_root_dir=folder,
        **quiet,
        **{"enable_checkpointing": False} | options,
    )


def steps_of(module):
    return [int(module.net.get_buffer(f"{index}.weight_synapses.steps")) for index in (0, 2)]


def by_hand(pipeline=PIPELINE, steps=3 * STEPS):
    """The same training, in a loop."""
    module = Digits(pipeline=pipeline)
    optimizer = module.configure_optimizers()
    biofx.attach(module.net, optimizer)
    batches = [batch for _ in range(3) for batch in data()]
    for batch in batches[:steps]:
        optimizer.zero_grad()
        module.training_step(batch).backward()
        optimizer.step()
    return module.state_dict()


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


@pytest.mark.parametrize("attaches", [True, False])
def test_fit_trains_as_a_loop_does(tmp_path, attaches):
    module = Digits(attaches)
    trainer(tmp_path, *([] if attaches else [BiofxCallback()])).fit(module, data())
    assert_same(module.state_dict(), by_hand())
    assert type(biofx.fold(module.net)) is nn.Sequential


@pytest.mark.parametrize("attaches", [True, False])
def test_a_second_fit_goes_on(tmp_path, attaches):
    module = Digits(attaches)
    for count in (1, 2):
        trainer(tmp_path, *([] if attaches else [BiofxCallback()]), epochs=1).fit(module, data())
        assert steps_of(module) == [count * STEPS] * 2


@pytest.mark.parametrize("attaches", [True, False])
def test_a_learning_rate_is_found_with_rules_and_then_fit(tmp_path, attaches):
    module, rules = Digits(attaches), [] if attaches else [BiofxCallback()]
    before, seen = copy.deepcopy(module.state_dict()), []
    step = module.training_step
    module.training_step = lambda batch: seen.append(steps_of(module)[0]) or step(batch)
    one = trainer(tmp_path, *rules)
    Tuner(one).lr_find(module, data(), num_training=5, early_stop_threshold=None)
    assert seen == [0, 1, 2, 3, 4]
    assert_same(module.state_dict(), before)
    one.fit(module, data())
    assert steps_of(module) == [3 * STEPS] * 2


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=12, save_top_k=-1, filename="{step}")
    whole = Digits()
    trainer(tmp_path, saving, BiofxCallback(), enable_checkpointing=True).fit(whole, data())
    rest = Digits()
    trainer(tmp_path, BiofxCallback()).fit(rest, data(), ckpt_path=tmp_path / "step=12.ckpt", weights_only=True)
    assert_same(rest.state_dict(), whole.state_dict())
    assert_same(rest.state_dict(), by_hand())


@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights_keep_what_rules_count(tmp_path, first):
    average = EMAWeightAveraging(decay=0.9, update_every_n_steps=4)
    callbacks = [BiofxCallback(), average] if first else [average, BiofxCallback()]
    module = Digits()
    saving = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, *callbacks, saving, enable_checkpointing=True).fit(module, data(), data())
    assert steps_of(module) == [3 * STEPS] * 2
    expected, saved = by_hand(), torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    for state in (module.state_dict(), saved):
        kept = {name for name in state if "_synapses." in name and not name.endswith("_synapses.weight")}
        assert_same({name: state[name] for name in kept}, {name: expected[name] for name in kept})
        assert not torch.equal(state["net.0.weight_synapses.weight"], expected["net.0.weight_synapses.weight"])


def test_a_module_without_a_transformed_model_is_refused(tmp_path):
    module = Digits()
    module.net = nn.Linear(8, 3)
    with pytest.raises(biofx.ArgumentError, match=r"no module of this Digits was made by biofx.transform"):
        trainer(tmp_path, BiofxCallback()).fit(module, data())


class FrozenAtFirst(Digits):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net, nn.Linear(3, 3)

    def training_step(self, batch):
        return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_a_part_that_is_trained_later_is_attached_then(tmp_path):
    module = FrozenAtFirst()
    frozen = biofx.fold(module.net).state_dict()
    trainer(tmp_path, BiofxCallback(), BackboneFinetuning(unfreeze_backbone_at_epoch=1), epochs=1).fit(module, data())
    assert steps_of(module) == [0, 0]
    for name, value in biofx.fold(module.net).state_dict().items():
        assert torch.equal(value, frozen[name]), name
    module = FrozenAtFirst()
    trainer(tmp_path, BackboneFinetuning(unfreeze_backbone_at_epoch=1), BiofxCallback()).fit(module, data())
    assert steps_of(module) == [2 * STEPS, 2 * STEPS]
    biofx.verify(module.net)
