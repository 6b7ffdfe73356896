"""The notebook runs from its first cell to its last, and has its output in it, for people who read it on the web."""

import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def kinds(cell):
    """What a cell puts out: text, tables, pictures."""
    found = [output.get("data", {"text": ""}) for output in cell.get("outputs", [])]
    return [sorted(data.keys() - {"text/plain"}) for data in found]


def test_the_tour_runs_and_shows_what_it_did(notebook, monkeypatch, tmp_path):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # else figures are not shown
    run = copy.deepcopy(notebook)
    for cell in run.cells:
        cell.pop("outputs", None)
    NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in run.cells if cell.cell_type == "code"]
    assert len(code) > 8
    assert [kinds(cell) for cell in code] == [kinds(c) for c in notebook.cells if c.cell_type == "code"]
    assert not any(output.output_type == "stream" and output.name == "stderr" for c in code for output in c.outputs)


def test_a_plain_network_comes_back(notebook):
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "largest difference of outputs: 0.0" in text
