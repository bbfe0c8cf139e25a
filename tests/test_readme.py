"""The README's tables of times are those of the result files."""

from pathlib import Path

import pytest

from benchmarks import harness, readme


def test_tables_are_those_of_the_results() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.write(text, readme.ROOT / readme.FOLDER) == text, "run python -m benchmarks.readme"


def test_results_that_change_change_the_tables(tmp_path: Path) -> None:
    for path in (readme.ROOT / readme.FOLDER).glob("*.json"):
        result = harness.read_json(path)
        for row in result["rows"]:
            if "median_ms" in row:
                row["median_ms"] = 98.7
        harness.write_json(tmp_path / path.name, result)
    text = readme.write((readme.ROOT / "README.md").read_text(), tmp_path)
    for name in readme.TABLES:
        assert "98.7" in text.partition(f"<!-- {name}")[2].partition(f"<!-- end of {name}")[0]


@pytest.mark.parametrize(
    "value, doubtful, shown",
    [
        (None, "", "–"),
        (0.34812, "", "0.348"),
        (1.2, "", "1.20"),
        (26.502, "wide", "26.5 ?"),
        (31.9, None, "31.9"),
        (16384.2, "", "16,384"),
    ],
)
def test_figures_have_three_digits(value: float | None, doubtful: str | None, shown: str) -> None:
    assert readme.figure(value, doubtful) == shown
