"""Table of prompts."""

from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from opensora.datasets.dataset import add_suffix, target_fps
from opensora.datasets.rows import ShardedRows, TableRows, read_numbers
from opensora.datasets.table import read_table, require_columns, row_name
from opensora.registry import DATASETS
from opensora.utils.errors import UserError

PASSED_ON = ("path", "neg", "ref", "name")  # columns that a sample also holds where the table has them


@DATASETS.register_module("text")
class TextDataset(Dataset):
    """Prompts, in the order of their table.

    Args:
        data_path: CSV or parquet table with a column ``text``; ``fps`` and ``score_vmafmotion`` are told to the model.
        fps_max: rates from which frames would be skipped in training; 999 or more leaves the rate out of the text.
        vmaf: append the motion score to the text.
        memory_efficient: read texts from the shards beside a (parquet) table instead of holding it.

    Raises:
        UserError: missing file or column, or an empty text.
    """

    def __init__(
        self, data_path: str | None = None, fps_max: float = 16.0, vmaf: bool = False, memory_efficient: bool = False
    ) -> None:
        if not data_path:
            raise UserError("dataset.data_path is not set: give a csv or parquet table of prompts")
        self.data_path, self.fps_max = str(data_path), fps_max
        self.rows: TableRows | ShardedRows
        self._fps: np.ndarray | None = None
        if memory_efficient:
            numbers = read_numbers(data_path, ("text",), ("score_vmafmotion",) if vmaf else ())
            self._fps = numbers["fps"].to_numpy()
            self.rows = ShardedRows(data_path, len(numbers))
        else:
            table = read_table(data_path)
            require_columns(table, ["text"], data_path)
            empty = table["text"].isna()
            if empty.any():
                raise UserError(f"{row_name(data_path, int(empty.to_numpy().argmax()))}: column 'text' is empty")
            self.rows = TableRows(table)
            if "fps" in table:
                self._fps = pd.to_numeric(table["fps"], errors="coerce").to_numpy(dtype=np.float64)
        self.vmaf = vmaf and "score_vmafmotion" in self.rows.columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"index", "text"}`` and those of ``path, neg, ref, name`` that the table has ("" where a cell is empty)."""
        row = self.rows[index]
        fps = 0.0 if self._fps is None else target_fps(float(self._fps[index]), self.fps_max)[0]
        motion = float(row["score_vmafmotion"]) if self.vmaf else None
        sample = {"index": index, "text": add_suffix(str(row["text"]), fps, self.fps_max, motion)}
        return {**sample, **{key: "" if pd.isna(row[key]) else str(row[key]) for key in PASSED_ON if key in row}}
