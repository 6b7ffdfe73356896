"""The command line."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import biofx
from biofx.__main__ import main
from models.small import ConvNet


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
    assert "biofx.share_grad" in capsys.readouterr().out


def test_export(capsys, tmp_path):
    path = tmp_path / "model.safetensors"
    assert main(["export", "models.small:ConvNet", str(path), "--passes", "split-synapses"]) == 0
    assert "stem.weight" in load_file(path)
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export_of_a_program_needs_an_input(capsys, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    command = ["export", "models.small:ConvNet", str(path), "--passes", "split-synapses"]
    assert main(command) == 1
    assert "needs an example of each input of the model, such as --input 2,3,224,224:float32" in capsys.readouterr().err
    assert main([*command, "--input", "2,1,8"]) == 1
    assert "example_inputs do not fit ConvNet.forward" in capsys.readouterr().err
    for wrong in ("2 by 3", "2,3:nothing", "2,:float32", ":int64"):
        with pytest.raises(SystemExit):
            main([*command, "--input", wrong])
        message = f"must be sizes and a dtype, such as 2,3,224,224:float32 or 2,16:int64, got {wrong!r}"
        assert message in " ".join(capsys.readouterr().err.split())
    assert not path.exists()
    assert main([*command, "--input", "2,1,8,8"]) == 0
    assert path.exists()


def test_units_of_a_plain_and_of_a_transformed_model(capsys):
    assert main(["units", "models.small:ConvNet", "--input", "2,1,8,8"]) == 0
    plain = capsys.readouterr().out
    assert "presynaptic units" in plain
    assert main(["units", "models.small:ConvNet", "--passes", "fuzzy-learning-rates", "--input", "2,1,8,8"]) == 0
    assert capsys.readouterr().out == plain


def test_draw(capsys, tmp_path):
    path = tmp_path / "model.mmd"
    assert main(["draw", "models.small:ConvNet", str(path), "--passes", "split-synapses", "--depth", "2"]) == 0
    assert "share_grad" in path.read_text()
    assert capsys.readouterr().out == f"wrote {path}\n"


def test_diff_with_the_model_and_with_other_passes(capsys, tmp_path):
    path = tmp_path / "model.mmd"
    command = ["diff", "models.small:ConvNet", "--passes", "fuzzy-learning-rates", "--frontend", "symbolic"]
    assert main([*command, "--draw", str(path)]) == 0
    out = capsys.readouterr().out
    assert "+ scale_grad" in out
    assert out.endswith(f"wrote {path}\n")
    assert main([*command, "--against", "split-synapses"]) == 0
    assert "- share_grad" in capsys.readouterr().out
    assert main([*command, "--against", "fuzzy-learning-rates"]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_a_saved_folder_takes_the_place_of_passes(capsys, tmp_path):
    torch.manual_seed(1)
    biofx.save(biofx.transform(ConvNet(), "split-synapses{synapses=3}"), tmp_path / "saved")
    assert main(["inspect", "models.small:ConvNet", "--saved", str(tmp_path / "saved")]) == 0
    assert "split-synapses{synapses=3}" in capsys.readouterr().out
    assert main(["inspect", "models.small:ConvNet", "--saved", str(tmp_path)]) == 1
    assert "give a folder that biofx.save wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "models.small:ConvNet", "--saved", str(tmp_path), "--passes", "cortex"])


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["draw", "--help"])
    assert "biofx draw my_package.models:make_rnn rnn.html" in capsys.readouterr().out


def test_a_closed_pipe_is_no_traceback():
    run = "import sys, biofx.__main__ as m; sys.exit(m.main(['passes']))"
    process = subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before the first line, as head does after its last
    assert process.wait() == 141
    assert process.stderr.read() == b""


class TokensAndFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(5, 4), nn.Linear(3, 4)

    def forward(self, tokens, features):
        return self.embedding(tokens).mean(1) + self.fc(features)


def test_inputs_are_given_by_sizes_and_dtype(capsys, tmp_path):
    path = tmp_path / "model.pt2"
    command = ["test_main:TokensAndFeatures", "--passes", "split-synapses"]
    inputs = ["--input", "2,6:int64", "--input", "2,3:float64"]
    assert main(["export", *command[:1], str(path), *command[1:], *inputs[:-1], "2,3"]) == 0
    program = torch.export.load(path).module()
    assert program(torch.tensor([[0, 1, 4]]), torch.zeros(1, 3)).shape == (1, 4)
    assert main(["inspect", *command, *inputs]) == 1
    assert "example_inputs do not fit TokensAndFeatures.forward" in capsys.readouterr().err


def needs_arguments(width):
    """A factory that cannot be called without arguments."""


def fails():
    raise RuntimeError("no\nweights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models.small", "--passes", "split-synapses"], "must be given as module:factory, got 'models.small'"),
        (["models.small:Nothing", "--passes", "split-synapses"], "cannot make the model 'models.small:Nothing': Att"),
        (["models.nothing:x", "--passes", "split-synapses"], "cannot make the model 'models.nothing:x': Module"),
        ([":net", "--passes", "split-synapses"], "must be given as module:factory, got ':net'"),
        (["models:", "--passes", "split-synapses"], "must be given as module:factory, got 'models:'"),
        (["test_main:needs_arguments", "--passes", "split-synapses"], "TypeError: needs_arguments() missing 1"),
        (["test_main:fails", "--passes", "split-synapses"], "'test_main:fails': RuntimeError: no weights"),
        (["models.small:ConvNet", "--passes", "nope"], "unknown pass 'nope'; the passes are"),
        (["math:pi", "--passes", "split-synapses"], "an instance of float, not a torch.nn.Module"),
    ],
)
def test_errors_are_one_line_and_status_one(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
