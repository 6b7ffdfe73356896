"""The experiments: what documents show of them is what the committed files say."""

import json
from pathlib import Path

import pytest

import report

ROOT = Path(__file__).parents[1]

DOCUMENT = "text\n<!-- results: speed -->\nanything\n<!-- end of results -->\nmore text\n"
ROWS = [{"condition": "plain", "steps": 60}, {"condition": "a | b", "score": -0.12345, "better": True}]
TABLE = """| condition | steps | score | better |
| --- | --- | --- | --- |
| plain | 60 | – | – |
| a \\| b | – | −0.123 | yes |"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps({"rows": ROWS, "other": [{"a": 1}], "deep": [{"a": [1]}]}))
    return tmp_path


@pytest.mark.parametrize("path", report.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_show_what_came_out(path):
    text = path.read_text(encoding="utf-8")
    assert report.updated(text) == text, "run python examples/report.py"


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_experiment_has_rows_and_a_figure(path):
    assert report.markdown(json.loads(path.read_text(encoding="utf-8"))["rows"])
    assert path.with_suffix(".png").exists()


def test_a_table_is_written_from_the_file(results):
    assert report.updated(DOCUMENT, results) == DOCUMENT.replace("anything", TABLE)


def test_a_written_table_stays_as_it_is(results):
    written = report.updated(DOCUMENT, results)
    assert report.updated(written, results) == written


def test_a_number_changed_by_hand_is_written_anew(results):
    written = report.updated(DOCUMENT, results)
    assert report.updated(written.replace("60", "50"), results) == written


def test_a_table_may_show_another_list(results):
    text = report.updated(DOCUMENT.replace("speed -->", "speed, other -->"), results)
    assert "| a |\n| --- |\n| 1 |" in text


def test_text_without_tables_stays_as_it_is(results):
    assert report.updated("<!-- note -->\n| a |\n", results) == "<!-- note -->\n| a |\n"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("<!-- end of results -->", "", ValueError),
        ("speed -->", "speed, deep -->", ValueError),
        ("speed -->", "speed, missing -->", KeyError),
        ("speed -->", "sped -->", FileNotFoundError),
    ],
    ids=["no end", "rows that are not flat", "no such list", "no such file"],
)
def test_a_mistake_is_an_error(results, old, new, error):
    with pytest.raises(error):
        report.updated(DOCUMENT.replace(old, new), results)
