"""What a client asks for: one video, in the words of the videos API, checked key by key."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora.config.choices import CONDITIONS, SOLVERS
from opensora.config.commands import InferenceOptions, ServeOptions
from opensora.config.keys import as_group, group_options
from opensora.config.options import Options, SamplingOption, check_bounds, opt
from opensora.config.values import coerce, describe, parse_text
from opensora.diffusion.plan import frame_size
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError
from opensora.utils.nearest import nearest_key

SIZE = re.compile(r"(\d{1,6})\s*[x*]\s*(\d{1,6})", re.IGNORECASE)
FILES = ("input_reference", "last_reference", "mask")  # fields that hold a picture or a clip
SEVERAL, MOST_SEVERAL = "references", 8  # the field that holds several of them, and how many
MOST_PROMPTS = 256  # of further windows


def numbered(number: int) -> str:
    """How messages name one of several references, from 0."""
    return f"{SEVERAL}[{number}]"


class BadField(UserError):
    """A field of a request that cannot be.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def like(group: type[Options], key: str) -> Any:
    """A field of a request that replaces a key of the config, with that key's help and bounds; none keeps it."""
    metadata = {name: value for name, value in group_options(group)[key].metadata.items() if name in BORROWED}
    return opt(None, **metadata)


BORROWED = ("help", "unit", "least", "most", "above", "below", "choices")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Options):
    """One video. Names are those of OpenAI's videos API and, beyond it, of vLLM-Omni's and diffusers'."""

    prompt: str = opt("", "text of the video", verbatim=True)
    negative_prompt: str = opt("", "what the video shall not be", verbatim=True)
    model: str | None = opt(None, "name of the model; there is one", verbatim=True)
    size: str | None = opt(None, "width x height, such as 1280x720", "px")
    seconds: float | None = opt(None, "length, to the nearest that the autoencoder makes", "s", above=0, most=3600)
    width: int | None = like(SamplingOption, "width")
    height: int | None = like(SamplingOption, "height")
    resolution: str | None = like(SamplingOption, "resolution")
    aspect_ratio: str | None = like(SamplingOption, "aspect_ratio")
    num_frames: int | None = like(SamplingOption, "num_frames")
    fps: int | None = like(InferenceOptions, "fps_save")
    num_inference_steps: int | None = like(SamplingOption, "num_steps")
    guidance_scale: float | None = like(SamplingOption, "guidance")
    image_guidance_scale: float | None = like(SamplingOption, "guidance_img")
    flow_shift: float | None = like(SamplingOption, "flow_shift")
    solver: str | None = opt(None, "how steps are made", choices=SOLVERS)
    seed: int | None = opt(None, "seed of the noise; none draws one", least=0, most=2**63 - 1)
    motion_score: str | None = like(InferenceOptions, "motion_score")
    refine_prompt: bool | None = like(InferenceOptions, "refine_prompt")
    cond_type: str | None = opt(None, "what the references fix; none goes by which are given", choices=CONDITIONS)
    places: str | None = opt(
        None, "frames of the video that the references are, for cond_type frames, such as 0;-1 or 0-32;96-128"
    )
    next_prompts: tuple[str, ...] | None = opt(None, "texts of the further windows of a long video; the last one stays")
    lora: str | None = opt(None, "adapter, by its name in the server's lora_dir", verbatim=True)
    lora_strength: float = opt(1.0, "its strength", least=-10, most=10)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "GenerationRequest":
        """A request from the fields of a form (texts) or of a JSON object.

        Raises:
            BadField: an unknown field, or a value of another type or out of its bounds.
        """
        known = group_options(cls)
        values = {}
        for name, value in fields.items():
            if name not in known:
                every = [*known, *FILES, SEVERAL]
                near = nearest_key(name, every)
                hint = f"; did you mean {near}?" if near else f"; known: {', '.join(every)}"
                raise BadField(name, f"{name} is not a known field{hint}")
            if name == "next_prompts":
                values[name] = _prompts(name, value)
            elif value is not None:
                values[name] = _value(name, value, known[name].hint, known[name].metadata)
        request = as_group(cls, values)
        request._check()
        return request

    def _check(self) -> None:
        """Refuse what fields say together."""
        if not self.prompt.strip():
            raise BadField("prompt", "prompt is empty")
        for one, others in (("size", ("width", "height", "resolution", "aspect_ratio")), ("seconds", ("num_frames",))):
            both = next((other for other in others if getattr(self, other) is not None), None)
            if getattr(self, one) is not None and both:
                raise BadField(one, f"{one} and {both} say the same; give one of them")
        if (self.width is None) != (self.height is None):
            raise BadField("width", "width and height must be given together")
        if self.width is not None and (self.resolution or self.aspect_ratio):
            raise BadField("width", "give width and height, or resolution and aspect_ratio")
        if self.size is not None:
            self._size()

    def _size(self) -> tuple[int | None, int | None]:
        """(height, width) where the request gives pixels."""
        if self.size is None:
            return self.height, self.width
        found = SIZE.fullmatch(self.size.strip())
        if found is None or not (int(found[1]) and int(found[2])):
            raise BadField("size", f"size {self.size[:40]!r}: expected width x height, such as 1280x720")
        return int(found[2]), int(found[1])

    def settings(self, cfg: ServeOptions, spec: LatentSpec) -> ServeOptions:
        """The config of the server with what this request replaces.

        Raises:
            UserError: values out of the bounds of their keys.
        """
        height, width = self._size()
        changes: dict[str, Any] = {
            "num_frames": self._frames(cfg, spec),
            "num_steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
            "guidance_img": self.image_guidance_scale,
            "flow_shift": self.flow_shift,
            "solver": self.solver,
            "seed": self.seed,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        if height is not None:
            changes |= {"height": height, "width": width, "resolution": None, "aspect_ratio": None}
        elif self.resolution or self.aspect_ratio:
            changes |= self._named_size(cfg.sampling_option)
        own: dict[str, Any] = {"prompt": self.prompt}
        for name, value in (("fps_save", self.fps), ("motion_score", self.motion_score)):
            own |= {name: value} if value is not None else {}
        own["next_prompts"] = list(self.next_prompts or ()) or None
        own["refine_prompt"] = cfg.refine_prompt if self.refine_prompt is None else self.refine_prompt
        return dataclasses.replace(cfg, sampling_option=dataclasses.replace(cfg.sampling_option, **changes), **own)

    def _named_size(self, option: SamplingOption) -> dict[str, Any]:
        """Keys for a resolution or an aspect ratio; the other is the config's."""
        ratio = self.aspect_ratio or option.aspect_ratio
        resolution = self.resolution or option.resolution
        if resolution is None:  # a config in pixels: as many of them, in another ratio
            rows, columns = frame_size(option, 1)
            resolution = f"{round((rows * columns) ** 0.5)}px"
        named = {"resolution": resolution, "aspect_ratio": ratio or "1:1"}
        return {"height": None, "width": None, **named}

    def _frames(self, cfg: ServeOptions, spec: LatentSpec) -> int | None:
        if self.seconds is None:
            return self.num_frames
        return spec.frames_of(self.seconds, self.fps or cfg.fps_save)

    def as_json(self) -> dict[str, Any]:
        """What differs from the defaults, by name: the request as JSON."""
        return {
            name: value
            for name, option in group_options(type(self)).items()
            if (value := getattr(self, name)) != option.default
        }


def _value(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """A field's value in its type; texts of other types are read as a command line's."""
    try:
        if isinstance(value, str) and not metadata.get("verbatim"):
            value = parse_text(value.strip(), hint)
        elif isinstance(value, str | int | float | bool):
            value = coerce(value, hint)
        else:
            raise ValueError(value)
    except (ValueError, OverflowError, SyntaxError):
        raise BadField(name, f"{name}={str(value)[:60]!r}: expected {describe(hint)}") from None
    if isinstance(value, str):
        _check_text(name, value)
    try:
        check_bounds(value, metadata, name)
    except UserError as error:
        raise BadField(name, str(error)) from None
    return value


def _prompts(name: str, value: Any) -> tuple[str, ...] | None:
    """Texts as a list, or in one text a line each."""
    texts = [line for line in value.splitlines() if line.strip()] if isinstance(value, str) else value or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadField(name, f"{name}={str(value)[:60]!r}: expected texts, as a list or a line each")
    if len(texts) > MOST_PROMPTS:
        raise BadField(name, f"{name}: {len(texts)} texts; at most {MOST_PROMPTS} are taken")
    for text in texts:
        _check_text(name, text)
    return tuple(texts) or None


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadField(name, f"{name}: half of a pair of surrogates is no letter") from None
    if "\0" in text:
        raise BadField(name, f"{name}: holds a NUL, which no text does")
