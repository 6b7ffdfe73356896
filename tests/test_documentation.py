"""Every example in a docstring runs, and so does every example in the README."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import biofx
import biofx.passes

MODULES = [
    module.name
    for package in (biofx, biofx.passes)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_docstring_examples_run(name):
    if name.startswith("biofx.integrations."):
        pytest.importorskip(name.rpartition(".")[2])  # the package whose name the module has
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0


def readme_blocks(language, folder=".", name="README.md"):
    text = (Path(__file__).parents[1] / folder / name).read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [content for its_language, content in blocks if its_language == language]


def test_readme_code_runs():
    namespace = {}
    for block in readme_blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    bio, model = namespace["bio"], namespace["model"]
    expected = [("split-synapses", "fuzzy-learning-rates")] * 2
    assert [site.passes for site in biofx.weight_sites(bio).values()] == expected
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), bio.eval()(x))  # it has what bio learned


def test_the_code_of_the_guide_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in readme_blocks("python", "biofx", "GUIDE.md"):
        exec(compile(block, "biofx/GUIDE.md", "exec"), namespace)
    assert (tmp_path / "checkpoint" / "pipeline.json").exists()
    models = biofx.load("checkpoint", namespace["model"]), namespace["bio"]
    assert torch.equal(*(model.get_buffer("0.weight_synapses.gain") for model in models))


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    folders = ("biofx", "examples", "passes", "tests")
    pages = [root / "README.md", *(page for folder in folders for page in (root / folder).rglob("*.md"))]
    assert len(pages) >= 6
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(root)}: {target}"


def test_readme_shows_what_is_printed(capsys):
    code, *_ = readme_blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in "\n".join(readme_blocks(""))


def test_readme_has_the_two_commands_first():
    install_and_run, install_and_test, *_ = readme_blocks("sh")
    assert install_and_run.splitlines()[-1] == "python examples/digits.py"
    assert install_and_test.splitlines()[-1] == "python -m pytest -n auto --dist worksteal"


def test_the_map_of_biofx_names_files_that_exist():
    folder = Path(biofx.__file__).parent
    paths = re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py))`", (folder / "README.md").read_text())
    elsewhere = (
        "passes/",
        "tests/models/",
        "tests/benchmarks/",
        "tests/test_rooms.py",
        "tests/base/test_torch_internals.py",
    )
    missing = [path for path in paths if path not in elsewhere and not (folder / path).exists()]
    assert len(paths) > 40
    assert missing == []
