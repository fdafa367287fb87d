"""Tables as every reader takes them."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora.datasets.rows import read_numbers, write_shards
from opensora.datasets.table import read_table, require_columns, row_name, write_table
from opensora.utils.errors import UserError

READERS = {
    "rows": read_table,
    "prompts": lambda path: read_table(path, as_text=True),
    "numbers": read_numbers,
    "shards": write_shards,
}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\na red circle, moving right\n", "more fields than its header.*row 2: 'a red circle, moving right'"),
        ("text\na\nb, c\n", "more fields than its header.*row 3"),
        ("text,seed\na red circle, moving right,5\n", "more fields.*row 2"),
        ('text,seed\n"a, b",4\na red circle, moving right,5\n', "more fields.*row 3"),
        ("text,seed,text\na,1,b\n", "two columns are named 'text'"),
        ("", "cannot be read as a table"),
        ("text\ncafé\n".encode("latin-1"), "not text in UTF-8"),
        ("text,seed\na,1\n".encode("utf-16"), "not text in UTF-8"),
    ],
)
def test_mistakes_in_csv(tmp_path, content, message, as_text):
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"t\.csv: .*{message}"):
        read_table(tmp_path / "t.csv", as_text)


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_columns_that_are_not_separated_by_commas(tmp_path, sign):
    (tmp_path / "t.csv").write_text(f"text{sign}seed\na{sign}1\n")
    with pytest.raises(UserError, match=r"missing column 'text'.*separated by .*; separate them by commas"):
        require_columns(read_table(tmp_path / "t.csv"), ["text"], tmp_path / "t.csv")


@pytest.mark.parametrize("reader", READERS)
def test_damaged_parquet(tmp_path, reader):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"text": ["a"] * 50}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # the length of the footer
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read as a table"):
        READERS[reader](path)


@pytest.mark.parametrize("cell", [["a", "b"], {"en": "a"}, b"a"])
def test_texts_that_are_none(tmp_path, cell):
    pd.DataFrame({"text": [cell]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read as a table \(column 'text' holds .*, not text\)"):
        read_table(tmp_path / "t.parquet")
    kinds = pd.DataFrame({"text": pd.Categorical(["a"]), "path": pd.array(["b"], "string")})
    kinds.to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", as_text=True).iloc[0].tolist() == ["a", "b"]


def test_cells_as_text(tmp_path):
    """Whole numbers keep all their digits, words stay words, and nothing is nothing."""
    table = pd.DataFrame({"seed": [12345678.0, None, 2.5], "text": ["none", "NA", None], "n": [2**60, 1, 0]})
    table.to_parquet(tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet", as_text=True)
    assert found["seed"].tolist() == ["12345678", "", "2.5"]
    assert found["text"].tolist() == ["none", "NA", ""]
    assert found["n"].tolist() == [str(2**60), "1", "0"]
    (tmp_path / "t.csv").write_text("text\nnone\n\n007\n\n\n")
    assert read_table(tmp_path / "t.csv", as_text=True)["text"].tolist() == ["none", "", "007"]


def test_whole_numbers_beside_empty_cells_keep_all_digits(tmp_path):
    large, table = 2**53 + 1, pa.table({"text": ["a", "b"], "id": pa.array([2**53 + 1, None], pa.int64())})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text(f"text,id,share\na,{large},\nb,,0.5\n")
    for name in ("t.parquet", "t.csv"):
        assert read_table(tmp_path / name, as_text=True)["id"].tolist() == [str(large), ""]
        found = read_table(tmp_path / name)
        write_table(found, tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_text().splitlines()[1].split(",")[:2] == ["a", str(large)]
        assert found["id"].isna().tolist() == [False, True]
    assert read_table(tmp_path / "t.csv")["share"].dtype == float
    (tmp_path / "t.csv").write_text(f"id\n{large}\nNA\nnull\n")  # which are no numbers either
    assert read_table(tmp_path / "t.csv")["id"].tolist() == [large, pd.NA, pd.NA]


def test_rows_are_counted_as_spreadsheets_do():
    assert row_name("t.csv", 0) == "t.csv, row 2"
