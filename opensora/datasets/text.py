"""Table of prompts."""

from typing import Any

from torch.utils.data import Dataset

from opensora.config.keys import given_config
from opensora.datasets.config import TextConfig
from opensora.datasets.table import read_table, require_columns
from opensora.registry import DATASETS
from opensora.utils.errors import UserError


@DATASETS.register_module("text")
class TextDataset(Dataset):
    """Prompts and what their table says of them, in its order.

    A dataset of the user's own that is to give prompts has ``data_path``, a length, and the same rows.

    Args:
        config: with the CSV or parquet table, which has a column ``text``.
        **keys: those of `TextConfig` instead.

    Raises:
        UserError: missing file or column, or a file that cannot be parsed.
    """

    def __init__(self, config: TextConfig | str | None = None, **keys: Any) -> None:
        data_path = given_config(TextConfig, config, keys, "dataset").data_path
        if not data_path:
            raise UserError("dataset.data_path is not set: give a csv or parquet table of prompts")
        self.data_path = data_path
        self._table = read_table(data_path, as_text=True)
        require_columns(self._table, ["text"], data_path)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, str]:
        """Cells of a row by column, "" where one is empty. Words such as ``none`` stay words."""
        return dict(zip(self._table.columns, self._table.iloc[index]))
