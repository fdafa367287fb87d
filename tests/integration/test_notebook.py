"""The notebook runs from its first cell to its last, in an empty folder; it is stored without what it printed."""

import json
import os

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
QUICK = {"num_steps=10": "num_steps=2", "--num 40": "--num 8", "max_steps = 20": "max_steps = 3"}


def test_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_it_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs requirements-dev.txt")
    client = pytest.importorskip("nbclient", reason="needs requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="needs requirements-dev.txt")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        for long, short in QUICK.items():
            cell.source = cell.source.replace(long, short)
    assert all(short in json.dumps(notebook) for short in QUICK.values())
    work = tmp_path / "work"
    work.mkdir()
    resources = {"metadata": {"path": str(work)}}
    client.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    assert "changed by the adapter: True\nas before without it: True\n" in printed
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4  # two videos, the curves, the adapter's
    assert sum(len(picture["data"]["image/png"]) for picture in pictures) < 400_000
    assert {"red.mp4", "blue.mp4", "lora.py", "clips", "lora"} <= {
        path.name for path in (work / "quickstart").iterdir()
    }
