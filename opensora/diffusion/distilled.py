"""What a distilled model says of how it is to be sampled: times, scales and solver, recorded in its weight file."""

import itertools
import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from opensora.config.commands import InferenceOptions
from opensora.config.options import SamplingOption
from opensora.diffusion.lora import as_list, split_lora
from opensora.diffusion.lora_files import find_lora
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import open_weights

logger = get_logger(__name__)

KEY = "distilled"  # in the metadata of a safetensors file
SCALES = ("guidance", "guidance_img", "text_osci", "image_osci", "scale_temporal_osci")


@dataclass(frozen=True)
class Distilled:
    """How a distilled model was trained to be sampled.

    Attributes:
        method: training method, for messages.
        scales: ``fixed``: one forward per step gives the velocity guided by the scales below; ``input``: the model
            takes any scales as input (the ones below are those to start from).
        guidance, guidance_img: scales of the text and of the image.
        positions: of the steps, falling from 1 to 0: times before the shift; None: any number of steps will do.
        shift, flow_shift: of the times, see :func:`opensora.diffusion.flow.get_schedule`.
        solver: name in :data:`opensora.diffusion.solvers.SOLVERS`.
        text_osci, image_osci, scale_temporal_osci: what its teacher's scales did over the steps; where they are
            inputs, they still do.
    """

    method: str
    scales: Literal["fixed", "input"]
    guidance: float
    guidance_img: float | None = None
    positions: tuple[float, ...] | None = None
    shift: bool = True
    flow_shift: float | None = None
    solver: str = "euler"
    text_osci: bool = False
    image_osci: bool = False
    scale_temporal_osci: bool = False

    @property
    def num_steps(self) -> int | None:
        """Steps that it was trained for; None: any number."""
        return None if self.positions is None else len(self.positions) - 1

    def describe(self, option: SamplingOption) -> str:
        """How it is sampled, in a line."""
        scales = "scales as input" if self.scales == "input" else f"guidance {self.guidance:g} within"
        return f"distilled model ({self.method}): {option.num_steps} steps by {option.solver}, {scales}"

    def metadata(self) -> dict[str, str]:
        """For the header of a weight file."""
        return {KEY: json.dumps(asdict(self))}

    @staticmethod
    def of(metadata: Mapping[str, str], file: object) -> "Distilled | None":
        """What a weight file records; None for a model that is not distilled.

        Raises:
            UserError: a record that this program does not know.
        """
        if KEY not in metadata:
            return None
        try:
            content: dict[str, Any] = json.loads(metadata[KEY])
            positions = content.get("positions")
            content["positions"] = None if positions is None else tuple(float(value) for value in positions)
            found = Distilled(**content)
            check_positions(found.positions or (1.0, 0.0), f"{file}: {KEY}")
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: what it records as '{KEY}' is of another version of opensora ({error})") from None
        return found


def even_positions(num_steps: int) -> tuple[float, ...]:
    """Positions of steps of equal length."""
    return tuple(1 - step / num_steps for step in range(num_steps + 1))


def check_positions(positions: tuple[float, ...], name: str) -> None:
    """Raise a UserError unless positions fall from 1 to 0."""
    falls = all(after < now for now, after in itertools.pairwise(positions))
    if len(positions) < 2 or positions[0] != 1 or positions[-1] != 0 or not falls:
        raise UserError(f"{name}: positions {list(positions)} must fall from 1 to 0")


def find_distilled(cfg: InferenceOptions) -> Distilled | None:
    """What the weights of a config's model record, or the adapters on it; the last of these that says something counts.

    Of weights that are not on this machine yet, nothing is known. Whether files are good is for others to say.
    """
    found = None
    if cfg.model is not None and cfg.model.from_pretrained and Path(cfg.model.from_pretrained).expanduser().exists():
        found = _recorded(Path(cfg.model.from_pretrained))
    for entry in as_list(cfg.pretrained_lora_path):
        path = Path(split_lora(entry)[0]).expanduser()
        found = (_recorded(path, is_lora=True) if path.exists() else None) or found
    return found


def _recorded(path: Path, is_lora: bool = False) -> Distilled | None:
    try:
        metadata = open_weights(find_lora(path) if is_lora else path).metadata
    except UserError:
        return None
    return Distilled.of(metadata, path)


def as_distilled(option: SamplingOption, distilled: Distilled, chosen: Container[str] = ()) -> SamplingOption:
    """Sampling options with what a distilled model asks for in place of what a config happens to say.

    Args:
        option: of the config or the call.
        distilled: what the model records.
        chosen: keys that the user gave on the command line or in the call; these stand, with a warning where the model
            was not made for them.
    """
    wanted: dict[str, Any] = {"method": "distill", "solver": distilled.solver, "shift": distilled.shift}
    wanted["flow_shift"] = distilled.flow_shift
    if distilled.num_steps is not None:
        wanted["num_steps"] = distilled.num_steps
    if distilled.scales == "fixed":
        wanted |= {key: getattr(distilled, key) for key in SCALES}
    for key, value in wanted.items():
        if key in chosen and getattr(option, key) != value:
            _warn(key, getattr(option, key), value, distilled)
    fixed = SCALES if distilled.scales == "fixed" else ()
    return replace(option, **{key: value for key, value in wanted.items() if key not in chosen or key in fixed})


def _warn(key: str, given: Any, value: Any, distilled: Distilled) -> None:
    if key in SCALES:
        logger.warning(
            "%s=%s has no effect: the model was distilled with %s=%s (%s)", key, given, key, value, distilled.method
        )
    else:
        logger.warning(
            "%s=%s: the model was distilled for %s=%s (%s), other values are not what it has learned",
            *(key, given, key, value, distilled.method),
        )
