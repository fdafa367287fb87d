"""Hooks of mkdocs: pages that lie beside ``docs`` are part of the site, and links between them lead to the right place.

The files stay as they are, so that they read well in a repository too: ``make docs``.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BESIDE = ("assets/demo/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
TARGET = re.compile(r"\]\(([^()\s:#]+)(#[^()\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages beside ``docs``, and the pictures that they show."""
    from mkdocs.structure.files import File

    for place in BESIDE:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page whose links are those of the site."""
    uri = page.file.src_uri
    source = ROOT / uri if uri in BESIDE else DOCS / uri
    return TARGET.sub(lambda found: _on_site(found, source, uri), markdown)


def _on_site(found: re.Match[str], source: Path, uri: str) -> str:
    target = (source.parent / found[1]).resolve()
    if not target.is_relative_to(ROOT):
        return found[0]
    inside = target.relative_to(DOCS) if target.is_relative_to(DOCS) else target.relative_to(ROOT)
    if not target.is_relative_to(DOCS) and inside.as_posix() not in BESIDE:
        return "]"  # a file that the site does not have: its name stays, without a link
    return f"]({os.path.relpath(inside, Path(uri).parent)}{found[2] or ''})"
