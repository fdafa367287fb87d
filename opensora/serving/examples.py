"""The example prompts of the page."""

from pathlib import Path

from opensora.config.commands import ServeOptions
from opensora.datasets.table import read_table, require_columns
from opensora.utils.errors import UserError
from opensora.utils.paths import is_file, shipped_root

COUNT = 4


def example_texts(cfg: ServeOptions) -> list[str]:
    """Prompts that the page offers: of the table that the user names, or some that come with the repository.

    Raises:
        UserError: no table, or no texts in it.
    """
    name = "demo.csv" if "demo" in cfg.config_path else "sora.csv"
    place = Path(cfg.examples).expanduser() if cfg.examples is not None else shipped_root() / "assets" / "texts" / name
    if cfg.examples is None and not is_file(place):  # installed without them
        return []
    table = read_table(place, as_text=True)
    require_columns(table, ["text"], place)
    texts = [text for text in table["text"].dropna().astype(str) if text.strip()]
    if not texts:
        raise UserError(f"examples: {place} has no text in its column 'text'")
    return texts[:COUNT]
