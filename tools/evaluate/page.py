"""A page of pictures of a table of measures: what each says of the folder, its best and its worst clips. One file."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tools.evaluate.measures import MEASURES, Measure

Frames = NDArray[np.uint8]

STRIP_FRAMES = 5
STRIP_HEIGHT = 96  # px
SHOWN = 4  # clips at either end
BINS = 24
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .2rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem; text-align: right; }
td:first-child { text-align: left; }
tr:nth-child(even) { background: #f5f5f5; } a { color: #06c; text-decoration: none; }
.ends { display: flex; gap: 2rem; flex-wrap: wrap; } .ends > div { flex: 1 1 30rem; }
figure { margin: .4rem 0; } figure img { display: block; max-width: 100%; } figcaption { font-size: 13px; color: #555; }
.meaning { color: #555; margin: 0 0 .5rem; } svg { fill: #69c; vertical-align: middle; }
"""


def picture_data(image: NDArray[np.uint8]) -> str:
    """A picture ``[H, W, 3]`` as the address of an ``img``."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def strip(frames: Frames, count: int = STRIP_FRAMES, height: int = STRIP_HEIGHT) -> NDArray[np.uint8]:
    """Some frames of a clip side by side, at one height."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    width = max(round(frames.shape[2] * height / frames.shape[1]), 1)
    how = Image.Resampling.NEAREST if height >= 2 * frames.shape[1] else Image.Resampling.LANCZOS
    scaled = [np.asarray(Image.fromarray(frames[index]).resize((width, height), how)) for index in chosen]
    gap = np.full((height, 2, 3), 255, np.uint8)
    return np.concatenate([part for picture in scaled for part in (picture, gap)][:-1], axis=1)


def histogram(values: NDArray[np.float64], width: int = 160, height: int = 24) -> str:
    """Bars of how often values occur, as SVG."""
    counts, _ = np.histogram(values, BINS)
    step, top = width / BINS, counts.max()
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - height * count / top:.1f}" width="{step - 1:.1f}" '
        f'height="{height * count / top:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return f'<svg width="{width}" height="{height}">{bars}</svg>'


def summary(table: pd.DataFrame, measures: Mapping[str, Measure]) -> pd.DataFrame:
    """Per measure: clips that have it, mean, median, 5th and 95th percentile."""
    rows = []
    for name in measures:
        values = table[name].dropna()
        low, middle, high = np.percentile(values, [5, 50, 95])
        rows.append({"measure": name, "clips": len(values), "mean": values.mean(), "5 %": low, "median": middle})
        rows[-1]["95 %"] = high
    return pd.DataFrame(rows)


def known_measures(table: pd.DataFrame) -> dict[str, Measure]:
    """Of the columns of a table: those that have numbers, also others than the built-in ones."""
    skipped = {"seed", "frames", "height", "width", "fps"}
    numeric = [
        name for name in map(str, table.select_dtypes("number")) if name not in skipped and table[name].notna().any()
    ]
    return {name: MEASURES.get(name, Measure("by a network", "high")) for name in numeric}


def write_page(table: pd.DataFrame, read: Callable[[str], Frames], title: str) -> str:
    """The page.

    Args:
        table: a row per clip, with ``name``, ``prompt`` and the measures.
        read: gives the frames of a clip by its name.
        title: of the page.
    """
    measures = known_measures(table)
    pictures: dict[str, str] = {}

    def figure(row: Mapping[Any, Any], name: str) -> str:
        clip = str(row["name"])
        if clip not in pictures:
            pictures[clip] = picture_data(strip(read(clip)))
        where = f" at {row['seam_at']}" if name == "seam" and row.get("seam_at") else ""
        said = html.escape(f"{row[name]:.4g}{where} - {clip}: {row['prompt']}")
        return f'<figure><img alt="" src="{pictures[clip]}"><figcaption>{said}</figcaption></figure>'

    parts = [f"<h1>{html.escape(title)}</h1>", _overview(table, measures)]
    for name, measure in measures.items():
        rows = table[table[name].notna()].sort_values(name, kind="stable").to_dict("records")
        count = min(SHOWN, (len(rows) + 1) // 2)
        ends = {"lowest": rows[:count], "highest": rows[::-1][:count]}
        words = {"low": ("best", "worst"), "high": ("worst", "best")}.get(measure.better, ("", ""))
        shown = "".join(
            f"<div><h3>{end}{f': {word}' if word else ''}</h3>{''.join(figure(row, name) for row in chosen)}</div>"
            for (end, chosen), word in zip(ends.items(), words)
        )
        said = html.escape(measure.meaning)
        parts.append(f'<h2 id="{name}">{name}</h2><p class="meaning">{said}</p><div class="ends">{shown}</div>')
    return document(title, parts)


def _overview(table: pd.DataFrame, measures: Mapping[str, Measure]) -> str:
    found = summary(table, measures)
    head = "".join(f"<th>{column}</th>" for column in found.columns)
    rows = []
    for row in found.to_dict("records"):
        name = row.pop("measure")
        cells = "".join(f"<td>{value:.4g}</td>" for value in row.values())
        bars = histogram(table[name].dropna().to_numpy(np.float64))
        rows.append(f'<tr><td><a href="#{name}">{name}</a></td>{cells}<td>{bars}</td></tr>')
    return f"<table><tr>{head}<th></th></tr>{''.join(rows)}</table>"


def document(title: str, parts: Sequence[str], style: str = STYLE) -> str:
    """A whole HTML file."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><body>{''.join(parts)}</body></html>\n"
    )


def write_html(text: str, path: Path) -> None:
    """Write a page to a place that is given."""
    path.write_text(text, encoding="utf-8")
