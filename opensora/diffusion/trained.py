"""Which conditions a model was trained on, as its weight files say."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from opensora.config.options import ModelOptions
from opensora.diffusion.conditions import takes_references
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import open_weights

logger = get_logger(__name__)

KEY = "conditions"  # in the metadata of a safetensors file


def conditions_metadata(weights: Mapping[str, float] | None) -> dict[str, str]:
    """What training with these weights of conditions records; nothing where there are none."""
    names = sorted(name for name, weight in (weights or {}).items() if weight > 0)
    return {KEY: json.dumps(names)} if names else {}


def trained_conditions(section: ModelOptions | None) -> list[str] | None:
    """Conditions that the weights of a config section were last trained on; None where they do not say."""
    if section is None or not section.from_pretrained or not Path(section.from_pretrained).expanduser().exists():
        return None
    try:
        names = json.loads(open_weights(Path(section.from_pretrained).expanduser()).metadata.get(KEY, "null"))
    except (UserError, ValueError):  # whether files are good is for others to say
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def note_untrained(section: ModelOptions | None, cond_types: Iterable[str]) -> None:
    """Say in the log which conditions the weights were not trained on, where they record it."""
    asked = [cond_type for cond_type in sorted(set(cond_types)) if takes_references(cond_type)]
    known = trained_conditions(section) if asked else None
    for cond_type in asked:
        if known is not None and cond_type not in known:
            logger.warning(
                "cond_type %s: these weights were trained on %s; --sampling_option.keep_given True holds on to what is "
                "given at every step",
                *(cond_type, ", ".join(known)),
            )
