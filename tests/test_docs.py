"""The README and docs/: what they may weigh, that every link leads somewhere, and that the site can be built."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import MARK

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page: str) -> None:
    text = (ROOT / page).read_text()
    lines = text.splitlines()
    assert len(lines) <= (150 if page == "README.md" else 200)
    assert len(text.split()) <= (1500 if page == "README.md" else 2500)
    if page == "README.md":
        assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    # mkdocs sees to those between pages of docs/, and to their anchors; here are those that leave it, and the README's.
    links = LINK.findall((ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_line_begins_with_a_figure(page: str) -> None:
    # CommonMark takes such a line for HTML, and the rest of it is no Markdown any more.
    text = (ROOT / page).read_text()
    assert [
        found[1] for found in MARK.finditer(text) if found[2] == "figure" and text[: found.start()].endswith("\n")
    ] == []
    assert not re.search(r"^ *<!-- figure", text, flags=re.MULTILINE)


def test_the_site_can_be_built(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="pip install -r docs/requirements.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    for name in ("SinkWindowCache", "endless", "StreamPool", "Stream", "stream", "verify", "cache_kwargs"):
        assert f'id="sink_cache.{name}"' in reference
    assert (tmp_path / "site" / "repository" / "results" / "hero.png").exists()
