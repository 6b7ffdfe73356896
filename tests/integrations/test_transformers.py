"""The Trainer of transformers trains a transformed model with one callback."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from biofx.integrations.transformers import BiofxCallback  # noqa: E402

PIPELINE = [
    passes.SplitSynapses(2),
    passes.FuzzyLearningRates(distribution="temporal", every=2),
    passes.Crystallize(),
    passes.Rejuvenate(),
]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, images, labels=None):
        logits = self.out(torch.relu(self.hidden(images)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


def classifier():
    torch.manual_seed(0)
    images = torch.randn(2, 8)
    return biofx.transform(Classifier(), PIPELINE, example_inputs=(images, torch.tensor([0, 1])))


def language_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return biofx.transform(transformers.GPT2LMHeadModel(config), PIPELINE, frontend="module")


def examples(model):
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "config"):
        tokens = torch.randint(16, (24, 6), generator=generator)
        return [{"input_ids": row, "labels": row} for row in tokens]
    return [{"images": torch.randn(8, generator=generator), "labels": torch.tensor(i % 3)} for i in range(24)]


def trainer(model, folder, *callbacks, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        **{"num_train_epochs": 2, "save_strategy": "no", "logging_strategy": "no"} | options,
    )
    data = examples(model)
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[BiofxCallback(), *callbacks]
    )


def steps_of(bio):
    return {int(site.state("steps")) for site in biofx.weight_sites(bio).values()}


MODELS = {"own": classifier, "of transformers": language_model}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_trainer_trains_with_rules_and_the_result_folds(make, tmp_path):
    bio = make()
    before = biofx.weight_sites(bio)
    trainer(bio, tmp_path).train()
    assert steps_of(bio) == {12}
    assert all(int(site.state("replaced")) > 0 for site in before.values())
    plain = biofx.fold(bio)
    row = examples(bio)[0]
    batch = {name: value.unsqueeze(0) for name, value in row.items()}
    torch.testing.assert_close(plain.eval()(**batch)["logits"], bio.eval()(**batch)["logits"])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_training_twice_goes_on(make, tmp_path):
    bio = make()
    one = trainer(bio, tmp_path, num_train_epochs=1)
    for count in (1, 2):
        one.train()
        assert steps_of(bio) == {count * 6}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_checkpoint_of_the_trainer_resumes_bit_for_bit(make, tmp_path):
    whole = make()
    trainer(whole, tmp_path, save_strategy="epoch").train()
    rest = make()
    trainer(rest, tmp_path, save_strategy="epoch").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    state, other = rest.state_dict(), whole.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def assert_resumes(whole, folder, output, **options):
    rest = language_model()
    trainer(rest, output, save_strategy="epoch", **options).train(resume_from_checkpoint=str(folder))
    state, other = rest.state_dict(), whole.state_dict()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def test_a_checkpoint_resumes_in_another_output_dir(tmp_path):
    whole = language_model()
    trainer(whole, tmp_path / "old", save_strategy="epoch").train()
    trainer(language_model(), tmp_path / "new", save_strategy="epoch", learning_rate=1e-2).train()  # has one as well
    assert_resumes(whole, tmp_path / "old" / "checkpoint-6", tmp_path / "new")


def test_a_checkpoint_that_was_moved_resumes_if_named(tmp_path):
    whole, moved = language_model(), tmp_path / "moved"
    trainer(whole, tmp_path / "old", save_strategy="epoch").train()
    (tmp_path / "old" / "checkpoint-6").rename(moved)
    with pytest.raises(biofx.LifecycleError, match=r"not in .*new.*, .*old.*resume_from_checkpoint=…\) as well"):
        assert_resumes(whole, moved, tmp_path / "new")
    assert_resumes(whole, moved, tmp_path / "new", resume_from_checkpoint=str(moved))


def test_a_checkpoint_without_a_note_of_its_run_resumes(tmp_path):
    whole, file = language_model(), tmp_path / "checkpoint-6" / "trainer_state.json"
    trainer(whole, tmp_path, save_strategy="epoch").train()
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["BiofxCallback"]
    file.write_text(json.dumps(state))
    assert_resumes(whole, file.parent, tmp_path)


def test_a_checkpoint_that_lacks_what_rules_kept_is_refused(tmp_path):
    trainer(language_model(), tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    (tmp_path / "checkpoint-6" / "biofx.pt").unlink()
    with pytest.raises(biofx.LifecycleError, match=r"biofx.pt .* is not in .*checkpoint-6, so what rules kept is lost"):
        trainer(language_model(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_the_best_weights_come_with_what_rules_kept_then(tmp_path):
    bio = language_model()
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    one = trainer(bio, tmp_path, metric_for_best_model="worse", greater_is_better=True, **options)
    one.evaluate = lambda *args, **kwargs: {"eval_worse": -one.state.global_step}
    one.train()
    assert steps_of(bio) == {6}
    saved = torch.load(tmp_path / "checkpoint-6" / "biofx.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in bio.state_dict().items())
