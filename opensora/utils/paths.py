"""Paths as people write them."""

from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced by the home folder, which a shell does not do after ``=`` and
    in tables; unchanged where there is a file of that very name, or no such user."""
    path = Path(path)
    if not str(path).startswith("~"):
        return path
    try:
        return path if path.exists() else path.expanduser()
    except (RuntimeError, OSError):
        return path
