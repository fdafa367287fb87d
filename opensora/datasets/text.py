"""Table of prompts."""

from torch.utils.data import Dataset

from opensora.datasets.table import read_table, require_columns
from opensora.registry import DATASETS
from opensora.utils.errors import UserError


@DATASETS.register_module("text")
class TextDataset(Dataset):
    """Prompts and what their table says of them, in its order.

    A dataset of the user's own that is to give prompts has ``data_path``, a length, and the same rows.

    Args:
        data_path: CSV or parquet table with a column ``text``.
        fps_max, vmaf, memory_efficient: of training; they change no prompt.

    Raises:
        UserError: missing file or column, or a file that cannot be parsed.
    """

    def __init__(
        self, data_path: str | None = None, fps_max: float = 16.0, vmaf: bool = False, memory_efficient: bool = False
    ) -> None:
        del fps_max, vmaf, memory_efficient
        if not data_path:
            raise UserError("dataset.data_path is not set: give a csv or parquet table of prompts")
        self.data_path = str(data_path)
        self._table = read_table(data_path, as_text=True)
        require_columns(self._table, ["text"], data_path)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, str]:
        """Cells of a row by column, "" where one is empty. Words such as ``none`` stay words."""
        return dict(zip(self._table.columns, self._table.iloc[index]))
