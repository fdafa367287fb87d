"""Headings, links and anchors of markdown files, as GitHub and the site read them."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
ADDRESS = re.compile(r"[a-z]+:", re.IGNORECASE)


class Link(NamedTuple):
    """A link or a picture of a page."""

    is_picture: bool
    text: str
    target: str  # as written: address, path, #anchor, path#anchor


def without_code(text: str) -> str:
    """A page without its code, in which nothing is a link or a heading."""
    return CODE.sub("", FENCE.sub("", text))


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of each heading."""
    return [(len(marks), title) for marks, title in HEADING.findall(FENCE.sub("", text))]


def links(text: str) -> Iterator[Link]:
    """Links and pictures, those within the text of another link too."""
    for mark, label, target in LINK.findall(without_code(text)):
        yield Link(bool(mark), label, target)
        yield from (Link(bool(inner), words, place) for inner, words, place in LINK.findall(label))


def slug(title: str) -> str:
    """The anchor of a heading on GitHub: letters, digits, hyphens; spaces are hyphens."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def site_slug(title: str) -> str:
    """The anchor of a heading on the site (Markdown's ``toc`` with ``slugify_unicode``)."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def anchors(text: str) -> set[str]:
    """All anchors of a page; of equal headings the later ones are numbered."""
    seen: Counter[str] = Counter()
    found = set()
    for _, title in headings(text):
        anchor = slug(title)
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken_links(page: Path, root: Path) -> list[str]:
    """What is wrong with the links of a page: files that are not there, or outside the repository; anchors likewise."""
    text = page.read_text("utf-8")
    wrong = []
    for link in links(text):
        if ADDRESS.match(link.target):
            continue
        path, _, anchor = link.target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(root) or not file.exists():
            wrong.append(f"{page.relative_to(root)}: {link.target}: no such file")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text("utf-8"))):
            wrong.append(f"{page.relative_to(root)}: {link.target}: no such heading")
    return wrong
