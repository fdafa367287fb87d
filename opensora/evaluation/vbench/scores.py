"""From the scores of single dimensions to VBench's quality, semantic and total score.

Ranges and weights are those of the leaderboard (github.com/Vchitect/VBench, scripts/constant.py, 2026-03-23): a score
is normalised to ``(x - low) / (high - low)``, groups are weighted means of these, the total a weighted mean of groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Dimensions that are averaged into one score.

    Attributes:
        name: of the score.
        weight: in the total.
        dimensions: weight of each.
    """

    name: str
    weight: float
    dimensions: Mapping[str, float]


@dataclass(frozen=True)
class Scale:
    """How a suite's scores are put together: its groups, and the ranges of dimensions that are not 0 to 1."""

    groups: tuple[Group, ...]
    ranges: Mapping[str, tuple[float, float]]

    @property
    def dimensions(self) -> list[str]:
        """All of them, in the order of tables."""
        return [name for group in self.groups for name in group.dimensions]

    def normalise(self, dimension: str, score: float) -> float:
        """A dimension's score on the scale from the worst to the best that was thought possible."""
        low, high = self.ranges.get(dimension, (0.0, 1.0))
        return (score - low) / (high - low)

    def group_score(self, group: Group, scores: Scores) -> float:
        """Weighted mean of a group's normalised scores."""
        parts = [weight * self.normalise(name, scores[name]) for name, weight in group.dimensions.items()]
        return sum(parts) / sum(group.dimensions.values())

    def summary(self, scores: Scores) -> dict[str, float]:
        """``total`` and the score of each group, of those whose dimensions are all there."""
        found = {
            group.name: self.group_score(group, scores)
            for group in self.groups
            if all(name in scores for name in group.dimensions)
        }
        if len(found) < len(self.groups):
            return found
        weights = {group.name: group.weight for group in self.groups}
        total = sum(weights[name] * value for name, value in found.items()) / sum(weights.values())
        return {"total": total, **found}


CONSISTENCY = {"subject_consistency": (0.1462, 1.0), "background_consistency": (0.2615, 1.0)}
SMOOTHNESS = (0.706, 0.9975)
T2V = Scale(
    groups=(
        Group(
            "quality",
            4.0,
            {
                **dict.fromkeys(("subject_consistency", "background_consistency", "temporal_flickering"), 1.0),
                **{"motion_smoothness": 1.0, "dynamic_degree": 0.5, "aesthetic_quality": 1.0, "imaging_quality": 1.0},
            },
        ),
        Group(
            "semantic",
            1.0,
            dict.fromkeys(
                (
                    *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"),
                    *("appearance_style", "temporal_style", "overall_consistency"),
                ),
                1.0,
            ),
        ),
    ),
    ranges={
        **CONSISTENCY,
        "temporal_flickering": (0.6293, 1.0),
        "motion_smoothness": SMOOTHNESS,
        "scene": (0.0, 0.8222),
        "appearance_style": (0.0009, 0.2855),
        "temporal_style": (0.0, 0.364),
        "overall_consistency": (0.0, 0.364),
    },
)
I2V = Scale(
    groups=(
        Group("i2v", 1.0, {"camera_motion": 0.1, "i2v_subject": 1.0, "i2v_background": 1.0}),
        Group(
            "quality",
            1.0,
            {
                **{"subject_consistency": 1.0, "background_consistency": 1.0, "motion_smoothness": 1.0},
                **{"dynamic_degree": 0.5, "aesthetic_quality": 1.0, "imaging_quality": 1.0},
            },
        ),
    ),
    ranges={
        **CONSISTENCY,
        "motion_smoothness": SMOOTHNESS,
        "i2v_subject": (0.1462, 1.0),
        "i2v_background": (0.2615, 1.0),
    },
)
SCALES = {"t2v": T2V, "i2v": I2V}
