"""The package of a user's own that docs/extending.md shows, taken from the page as it stands."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)


def page_files() -> dict[str, str]:
    """Files of the page by their names, package and configs."""
    return dict(BLOCK.findall(PAGE.read_text()))


def write_package(folder: Path) -> None:
    """Write the package into a folder."""
    for name, code in page_files().items():
        if "/" in name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)


def with_page(base: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Content of a config with that of a config of the page put over it; a section of another type replaces."""
    shown: dict[str, Any] = {}
    exec(page_files()[name], {}, shown)
    content = dict(base)
    for key, value in shown.items():
        replaces = not isinstance(value, dict) or "type" in value
        content[key] = value if replaces else {**content.get(key, {}), **value}
    return content
