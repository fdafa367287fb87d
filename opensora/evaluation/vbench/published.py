"""Published VBench scores, to stand beside one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opensora.evaluation.vbench.scores import T2V

# The leaderboard as of 2025-02, as quoted by arXiv:2502.06782 (Lumina-Video), tables 1 and 4
QUOTED = "leaderboard, quoted by arXiv:2502.06782 (2025-02-10)"


@dataclass(frozen=True)
class Published:
    """Scores of a model, 0 to 1.

    Attributes:
        model: its name.
        source: where they stand, with the date.
        summary: total, quality and semantic as published (not recomputed).
        scores: of the dimensions, as far as they were published.
    """

    model: str
    source: str
    summary: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)


def _percent(total: float, quality: float, semantic: float) -> dict[str, float]:
    return {"total": total / 100, "quality": quality / 100, "semantic": semantic / 100}


def _dimensions(*percent: float) -> dict[str, float]:
    """In the order of the leaderboard's columns, which is that of tables here."""
    return {name: value / 100 for name, value in zip(T2V.dimensions, percent, strict=True)}


T2V_ROWS = (
    Published("Open-Sora 1.2 (240p, 2 s)", "its report, docs/report_03.md (2024-06-17)", _percent(79.23, 80.71, 73.30)),
    Published(
        "Open-Sora 1.2 (720p, 8 s)",
        QUOTED,
        _percent(79.76, 81.35, 73.39),
        _dimensions(
            *(96.75, 97.61, 99.53, 98.50, 42.39, 56.85, 63.34),
            *(82.22, 51.83, 91.20, 90.08, 68.56, 42.44, 23.95, 24.54, 26.85),
        ),
    ),
    Published(
        "Open-Sora 2.0",
        "Sora's 84.28 less the gap of 0.69 that its README states (2025-03-12); nothing finer was published there",
        {"total": 0.8359},
    ),
    Published(
        "HunyuanVideo",
        QUOTED,
        _percent(83.24, 85.09, 75.82),
        _dimensions(
            *(97.37, 97.76, 99.44, 98.99, 70.83, 60.36, 67.56),
            *(86.10, 68.55, 94.40, 91.60, 68.68, 53.88, 19.80, 23.89, 26.44),
        ),
    ),
    Published("Wan 2.1", "leaderboard, entry Wan2.1 (2025-01)", _percent(84.70, 85.64, 80.95)),
    Published("Wan 2.1 (2025-02-24)", "leaderboard, entry of 2025-02-24", _percent(86.22, 86.67, 84.44)),
)
ROWS: dict[str, tuple[Published, ...]] = {"t2v": T2V_ROWS, "i2v": ()}
