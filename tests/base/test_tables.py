"""Tables: columns without notes are omitted, and a table that is too wide has its long notes below it."""

from biofx.base.tables import INLINE, WIDTH, Report, Table

LONG = "because " * 8 + "it is"


def test_columns_of_notes_are_shown_if_there_is_a_note():
    rows = [["a", [], ["x", "y"]], ["b", [], []]]
    assert str(Table(("weight", "left alone", "remark"), rows)).splitlines() == [
        "weight    remark",
        "--------  --------",
        "a         x;",
        "          y",
        "b",
    ]


def test_notes_of_a_table_that_fits_stay_in_their_rows():
    assert str(Table(("weight", "note"), [["a", [LONG]]])).splitlines()[-1] == f"a         {LONG}"


def test_equal_long_notes_of_a_wide_table_share_a_number():
    assert len(LONG) > INLINE
    rows = [["a" * 60, [LONG]], ["b", ["short", LONG]], ["c", [f"{LONG} other"]]]
    table, notes = str(Table(("weight", "note"), rows)).split("\n\n")
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["[1]", "short", "[1]", "[2]"]
    assert notes.splitlines() == [f"[1] {LONG}", f"[2] {LONG} other"]


def test_limited_columns_are_wrapped_in_wide_tables_only():
    narrow, wide = (Table(("weight", "units"), [["a", "unit " * n]], {"units": 20}) for n in (10, 30))
    assert len(str(narrow).splitlines()) == 3
    assert len(str(wide).splitlines()) > 3
    assert max(map(len, str(wide).splitlines())) <= WIDTH


def test_a_column_of_usual_cells_is_omitted():
    table = Table(("weight", "Γ"), [["a", "1"], ["b", "1"]], usual={"Γ": "1"})
    assert str(table).splitlines()[0] == "weight"
    other = Table(("weight", "Γ"), [["a", "1"], ["b", "2"]], usual={"Γ": "1"})
    assert str(other).splitlines()[0].split() == ["weight", "Γ"]


def test_markup_in_a_report_is_escaped():
    report = Report([Table(("weight",), [["<b>"]]), "a < b"], [])
    assert "&lt;b&gt;" in report._repr_html_()
    assert "a &lt; b" in report._repr_html_()
