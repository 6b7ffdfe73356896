"""The command line."""

import pytest
from safetensors.torch import load_file

from biofx.__main__ import main


def test_passes_lists_every_pass_with_its_options(capsys):
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert "split-synapses" in out
    assert "synapses=2" in out
    assert "Draw a gain c for every synapse" in out


def test_inspect(capsys):
    assert (
        main(["inspect", "models.small:ConvNet", "--passes", "split-synapses{synapses=3}", "--exclude", "head*"]) == 0
    )
    out = capsys.readouterr().out
    assert "stem.weight" in out
    assert 'excluded by pattern "head*"' in out
    assert "scale_grad" not in out
    main(["inspect", "models.small:ConvNet", "--passes", "split-synapses", "--nodes"])
    assert "biofx.scale_grad" in capsys.readouterr().out


def test_export(capsys, tmp_path):
    path = tmp_path / "model.safetensors"
    assert main(["export", "models.small:ConvNet", str(path), "--passes", "split-synapses"]) == 0
    assert "stem.weight" in load_file(path)
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models.small", "--passes", "split-synapses"], "must be given as module:factory, got 'models.small'"),
        (["models.small:Nothing", "--passes", "split-synapses"], "cannot find the model 'models.small:Nothing'"),
        (["models.small:mlp", "--passes", "nope"], "unknown pass 'nope'; the passes are"),
        (["math:pi", "--passes", "split-synapses"], "an instance of float, not a torch.nn.Module"),
    ],
)
def test_errors_are_one_line_and_status_one(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
