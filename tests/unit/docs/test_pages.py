"""Pages hang together: links and anchors lead somewhere, both READMEs say the same, every page is listed."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tools.docs import site
from tools.docs.links import FENCE, anchors, broken_links, headings, links, site_slug, slug, without_code

ROOT = Path(__file__).parents[3]
TOP = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted([*(ROOT / name for name in TOP), *(ROOT / "docs").glob("*.md"), *(ROOT / "assets").rglob("*.md")])
ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in TOP[:2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page, ROOT) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headings(page):
    """One title, no level left out, and anchors that are the same on GitHub and on the site."""
    levels = [level for level, _ in headings(page.read_text("utf-8"))]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for _, title in headings(page.read_text("utf-8")):
        assert slug(title) == site_slug(title), title


def test_faults_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Title\n\n## What's `new`, in 2.0?\n\n## Twice\n\n## Twice\n")
    page.write_text(
        "# A\n\n[ok](other.md#whats-new-in-20) [ok](other.md#twice-1) [own](#a) [web](https://x.y/z)\n"
        "[![badge](missing.png)](other.md)\n[gone](gone.md) [none](other.md#none) [out](../../out.md)\n"
        "```\n[code](code.md)\n# no heading\n```\n`[inline](inline.md)`\n"
    )
    assert broken_links(page, tmp_path) == [
        "page.md: missing.png: no such file",
        "page.md: gone.md: no such file",
        "page.md: other.md#none: no such heading",
        "page.md: ../../out.md: no such file",
    ]
    assert anchors(page.read_text()) == {"a"}


def commands(text: str) -> list[str]:
    """Code blocks, without their comments, which are translated."""
    return [re.sub(r" +# .*", "", block[0]) for block in re.finditer(FENCE, text)]


def test_both_readmes_have_the_same_commands():
    assert commands(ENGLISH) == commands(CHINESE)
    assert len(commands(ENGLISH)) >= 6


def test_both_readmes_have_the_same_headings_and_contents():
    assert [level for level, _ in headings(ENGLISH)] == [level for level, _ in headings(CHINESE)]
    for text in (ENGLISH, CHINESE):
        listed = [link.target[1:] for link in links(text) if link.target.startswith("#")]
        titles = [slug(title) for level, title in headings(text) if level == 2]
        assert listed == titles


def test_both_readmes_have_the_same_links_and_pictures():
    def targets(text: str) -> list[tuple[bool, str]]:
        switches = ("README.md", "README.zh.md")
        return [(x.is_picture, x.target) for x in links(text) if x.target[0] != "#" and x.target not in switches]

    assert targets(ENGLISH) == targets(CHINESE)
    assert "[简体中文](README.zh.md)" in ENGLISH.split("## ")[0]
    assert "[English](README.md)" in CHINESE.split("## ")[0]


def test_both_readmes_have_the_same_figures_and_names():
    """Numbers, file names, flags and keys are not translated."""

    def parts(text: str) -> list[str]:
        body = FENCE.sub("", text).split("## ", 1)[1]
        return sorted(re.findall(r"`[^`]+`", body)), sorted(re.findall(r"\d+(?:\.\d+)?", without_code(body)))

    assert parts(ENGLISH) == parts(CHINESE)


def test_figures_of_cards_are_those_of_the_hardware_page():
    """Each row: card, memory at 256px, seconds at 256px and 768px, flags."""
    page = (ROOT / "docs" / "hardware.md").read_text("utf-8")
    sections = {title: page.split(f"## {title}\n")[1].split("\n## ")[0] for title in ("256px t2v", "768px t2v")}
    rows = re.findall(r"^\| (.+), (measured|stated) \| (.+) \| (.+) \| (.+) \| (.*?) ?\|$", ENGLISH, re.MULTILINE)
    assert len(rows) >= 5
    for card, kind, memory, small, large, flags in rows:
        for title, seconds in (("256px t2v", small), ("768px t2v", large)):
            (row,) = re.findall(rf"^\| {re.escape(card)} \| {kind} \|.*$", sections[title], re.MULTILINE)
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert cells[4] == seconds, (card, title)
            assert flags in row
            assert title == "768px t2v" or cells[2] == memory


def test_pictures_are_there_and_small():
    shown = [ROOT / link.target for link in links(ENGLISH) if link.is_picture and "://" not in link.target]
    assert len(shown) >= 3
    assert all(picture.suffix == ".webp" for picture in shown), "they move"
    assert sum(picture.stat().st_size for picture in shown) < 2e6


def test_every_picture_of_the_docs_is_shown_somewhere():
    shown = {(page.parent / link.target).resolve() for page in PAGES for link in links(page.read_text("utf-8"))}
    assert {path for path in (ROOT / "docs" / "images").iterdir() if not path.name.startswith(".")} <= shown


def test_every_page_is_in_the_index_and_on_the_site():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    index = {link.target.split("#")[0] for link in links((ROOT / "docs" / "README.md").read_text("utf-8"))}
    assert pages <= index
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    on_site = re.findall(r": (\S+\.md)$", settings, re.MULTILINE)
    assert sorted(on_site) == sorted([*pages, "README.md", *site.BESIDE])


class Page:
    """As much of a page of mkdocs as the hook looks at."""

    def __init__(self, uri: str) -> None:
        self.file = type("File", (), {"src_uri": uri})


@pytest.mark.parametrize(
    ("uri", "text", "expected"),
    [
        ("ae.md", "[a](train.md#x) [b](#y) [c](https://z.org)", "[a](train.md#x) [b](#y) [c](https://z.org)"),
        ("ae.md", "[a](../assets/demo/README.md#x)", "[a](assets/demo/README.md#x)"),
        ("assets/demo/README.md", "![a](../../docs/images/evaluation.png)", "![a](../../images/evaluation.png)"),
        ("CONTRIBUTING.md", "[a](docs/extending.md) [b](LICENSE)", "[a](extending.md) [b]"),
    ],
)
def test_links_on_the_site(uri, text, expected):
    assert site.on_page_markdown(text, Page(uri)) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_fit_the_page(page):
    """Long ones are continued with a backslash."""
    widest = 100 if page.name.startswith("README.") and page.parent == ROOT else 120
    code = [line for block in re.finditer(FENCE, page.read_text("utf-8")) for line in block[0].splitlines()]
    commands = [line.partition("    #")[0] for line in code if line.startswith(("python ", "torchrun ", "opensora "))]
    assert [line for line in commands if len(line) > widest] == []
    assert all(after.startswith("    ") for line, after in pairwise(code) if line.endswith("\\"))
