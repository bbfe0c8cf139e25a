"""What docs/attention.md says of attention implementations. flex_attention is not run: it takes the compiler half a minute."""

import json

import pytest

from .attention import PAGE, ROOT, WAYS, examine, model_with, page_with_tables

RESULT = json.loads((ROOT / "results" / "attention-cpu.json").read_text())


ROWS = {
    f"{row['attention']}-{row['compileable']}": row for row in RESULT["rows"] if row["attention"] in ("eager", "sdpa")
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_table_is_what_happens(row: dict) -> None:
    model = model_with(row["attention"], "cpu")
    assert {way: examine(model, way, row["compileable"])["outcome"] for way in WAYS} == {
        way: row[way]["outcome"] for way in WAYS
    }


def test_a_refusal_is_an_error_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("error: of something else")

    model = model_with("flex_attention", "cpu")
    assert examine(model, "stream()", compileable=True)["outcome"] == "refused"
    monkeypatch.setitem(WAYS, "stream()", fails)
    found = examine(model, "stream()", compileable=True)
    assert found == {"outcome": "fails", "reason": "ValueError: error: of something else"}


def test_nothing_is_silently_wrong() -> None:
    for path in (ROOT / "results").glob("attention-*.json"):
        outcomes = {row[way]["outcome"] for row in json.loads(path.read_text())["rows"] for way in WAYS}
        assert outcomes <= {"exact", "refused", "fails", "–"}


def test_the_page_has_the_tables_of_the_files() -> None:
    assert PAGE.read_text() == page_with_tables()
