"""Hooks of mkdocs.

Links that lead out of docs/ lead to copies of these files in the site, and only to files that exist. Types in docstrings,
as in "name (`int`, *optional*)", are shown without their Markdown.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files outside of docs/ that a page links to."""
    pages = list(files.documentation_pages())
    for page in pages:
        for path in LINK.findall(page.content_string):
            if not (ROOT / path).is_file():
                raise PluginError(f"{page.src_uri} links to {path}, which is not there")
            if files.get_file_from_path(in_site(path)) is None:
                files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes the links of a page lead there."""
    return LINK.sub(lambda found: in_site(found[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Takes the Markdown out of types."""
    return re.sub(r"<code>([^<]*`[^<]*)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site. Markdown would become a page there, which nothing leads to."""
    return f"repository/{path}{'.txt' if path.endswith('.md') else ''}"
