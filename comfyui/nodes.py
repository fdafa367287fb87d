"""The nodes: load a pipeline, put LoRA adapters on, say what the video is of, sample, decode.

ComfyUI keeps what a node gave as long as its inputs stay, so values that pass between nodes are never changed: adapters
are noted by their node and put on when the sampler runs. opensora is imported when a node first works, so that ComfyUI
starts as fast as without these nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import folder_paths

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from opensora import SampleResult, VideoPipeline

CATEGORY = "Open-Sora"
FROM_CONFIG = "from config"
DEVICES = ("auto", "cuda", "cpu")
DTYPES = (FROM_CONFIG, "bf16", "fp16", "fp32")
OFFLOADS = {FROM_CONFIG: None, "off": False, "whole models": True, "blocks": "blocks", "blocks from disk": "disk"}
MAX_SEED = 2**63 - 1  # opensora's
AUTO = "auto"
CONDITIONS = (
    *(AUTO, "t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"),
    *("extend_left", "extend_right"),
)


@dataclass(frozen=True)
class Loaded:
    """A pipeline and the adapters, (path, strength) each, that are to be on its video model."""

    pipe: VideoPipeline
    loras: tuple[tuple[str, float], ...] = ()

    def ready(self) -> VideoPipeline:
        """The pipeline with these adapters on, and no others."""
        if tuple((lora.path, lora.strength) for lora in self.pipe.loras) != self.loras:
            self.pipe.unload_lora()
            for path, strength in self.loras:
                self.pipe.load_lora(path, strength)
        return self.pipe


@dataclass(frozen=True)
class Request:
    """What a video is of: texts, references (uint8 [T, H, W, 3] each), and what these fix."""

    prompt: str
    negative: str = ""
    cond_type: str = "t2v"
    references: list[np.ndarray] = field(default_factory=list)
    motion_score: float = 0.0


class OpenSoraLoader:
    """Loads a pipeline: a shipped config, a file, a folder, or a repository of a hub."""

    RETURN_TYPES = ("OPENSORA_PIPELINE",)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Load a video pipeline of Open-Sora."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI's node contract."""
        hint = "name of a shipped config (demo, 256px, 768px), a config file, a folder, or org/name on a hub"
        weights = "file of the video model, instead of the config's"
        return {
            "required": {
                "config": ("STRING", {"default": "demo", "tooltip": hint}),
                "device": (list(DEVICES), {"default": "auto"}),
                "dtype": (list(DTYPES), {"default": FROM_CONFIG}),
                "offload": (list(OFFLOADS), {"default": FROM_CONFIG, "tooltip": "for cards with less memory"}),
            },
            "optional": {"weights": ("STRING", {"default": "", "tooltip": weights})},
        }

    def load(self, config: str, device: str, dtype: str, offload: str, weights: str = "") -> tuple[Loaded]:
        """Load it. Models that ComfyUI holds leave the GPU first."""
        from opensora import VideoPipeline

        overrides: dict[str, Any] = {}
        if dtype != FROM_CONFIG:
            overrides["dtype"] = dtype
        if OFFLOADS[offload] is not None:
            overrides["offload"] = OFFLOADS[offload]
        if weights.strip():
            overrides["model.from_pretrained"] = weights.strip()
        _make_room()
        where = None if device == "auto" else device
        return (Loaded(VideoPipeline.from_pretrained(config.strip(), device=where, **overrides)),)


class OpenSoraLora:
    """Puts a LoRA adapter on the video model, beside those that are on it."""

    RETURN_TYPES = ("OPENSORA_PIPELINE",)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "put"
    CATEGORY = CATEGORY
    DESCRIPTION = "A LoRA adapter of PEFT, diffusers, ComfyUI or Kohya on an Open-Sora pipeline."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI's node contract."""
        return {
            "required": {
                "pipeline": ("OPENSORA_PIPELINE",),
                "lora": (folder_paths.get_filename_list("loras"), {"tooltip": "a file of the folder models/loras"}),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}),
            }
        }

    def put(self, pipeline: Loaded, lora: str, strength: float) -> tuple[Loaded]:
        """Note it for the sampler."""
        path = folder_paths.get_full_path("loras", lora)
        if path is None:
            raise ValueError(f"there is no LoRA {lora} in ComfyUI's folder models/loras")
        return (replace(pipeline, loras=(*pipeline.loras, (str(path), float(strength)))),)


class OpenSoraPrompt:
    """Says what the video is of: texts, and pictures or a clip that it starts or ends with."""

    RETURN_TYPES = ("OPENSORA_PROMPT",)
    RETURN_NAMES = ("prompt",)
    FUNCTION = "describe"
    CATEGORY = CATEGORY
    DESCRIPTION = "Prompt of an Open-Sora video, with pictures or a clip that it starts or ends with."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI's node contract."""
        score = "amount of motion told to the model, 0 takes the config's"
        fixed = "auto: first, last or both frames are fixed, or the video goes on from the clip"
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "default": "a red circle moving right"}),
                "negative": ("STRING", {"multiline": True, "default": ""}),
                "condition": (list(CONDITIONS), {"default": AUTO, "tooltip": fixed}),
                "motion_score": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 15.0, "tooltip": score}),
            },
            "optional": {
                "first_frame": ("IMAGE",),
                "last_frame": ("IMAGE",),
                "clip": ("IMAGE", {"tooltip": "frames of a video to go on from, or to lead to (v2v_tail)"}),
            },
        }

    def describe(
        self,
        prompt: str,
        negative: str,
        condition: str,
        motion_score: float,
        first_frame: Tensor | None = None,
        last_frame: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> tuple[Request]:
        """Put it together; of a batch of pictures the first counts."""
        if clip is not None and (first_frame is not None or last_frame is not None):
            raise ValueError("give a clip, or a first and a last frame, not both")
        pictures = [picture[:1] for picture in (first_frame, last_frame) if picture is not None]
        references = [_pixels(images) for images in (pictures if clip is None else [clip])]
        if condition == AUTO:
            condition = _condition(first_frame is not None, last_frame is not None, clip is not None)
        return (Request(prompt, negative, condition, references, motion_score),)


class OpenSoraSampler:
    """Makes the latents of a video; shows its steps, and stops when ComfyUI is told to."""

    RETURN_TYPES = ("OPENSORA_LATENTS",)
    RETURN_NAMES = ("latents",)
    FUNCTION = "sample"
    CATEGORY = CATEGORY
    DESCRIPTION = "Sample the latents of an Open-Sora video."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI's node contract."""
        side = {"default": 0, "min": 0, "max": 4096, "step": 16}
        return {
            "required": {
                "pipeline": ("OPENSORA_PIPELINE",),
                "prompt": ("OPENSORA_PROMPT",),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the config's"}),
                "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "tooltip": "0: the config's"}),
                "width": ("INT", {**side, "tooltip": "0: the config's"}),
                "height": ("INT", {**side, "tooltip": "0: the config's"}),
                "num_frames": ("INT", {"default": 0, "min": 0, "max": 10000, "tooltip": "0: the config's"}),
                "fps": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 120.0, "tooltip": "0: the config's"}),
            }
        }

    def sample(
        self, pipeline: Loaded, prompt: Request, seed: int, steps: int, guidance: float, width: int, height: int,
        num_frames: int, fps: float,
    ) -> tuple[tuple[SampleResult, float]]:  # fmt: skip
        """Sample; latents are on the CPU, with the frame rate that the model was told."""
        sizes = {"num_steps": steps, "guidance": guidance, "width": width, "height": height, "num_frames": num_frames}
        chosen: dict[str, Any] = {key: value for key, value in sizes.items() if value}
        if prompt.motion_score:
            chosen["motion_score"] = prompt.motion_score
        _make_room()
        pipe, bar = pipeline.ready(), _Steps()
        result = pipe(
            prompt.prompt, ref=prompt.references or None, cond_type=prompt.cond_type, seed=seed, neg=prompt.negative,
            fps=fps or None, on_step=bar, progress=False, decode=False, **chosen,
        )  # fmt: skip
        return ((result, fps or float(pipe.cfg.fps_save)),)


class OpenSoraDecode:
    """Makes frames of latents."""

    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")
    FUNCTION = "decode"
    CATEGORY = CATEGORY
    DESCRIPTION = "Decode the latents of an Open-Sora video to frames."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI's node contract."""
        return {"required": {"pipeline": ("OPENSORA_PIPELINE",), "latents": ("OPENSORA_LATENTS",)}}

    def decode(self, pipeline: Loaded, latents: tuple[SampleResult, float]) -> tuple[Tensor, float]:
        """Frames [T, H, W, 3], float32 in 0..1, and the frame rate."""
        result, fps = latents
        sink = _Frames(len(range(result.plan.length)[result.plan.kept_frames()]))
        pipeline.pipe.decode_into(sink, result.latents, result.plan, result.kept)
        return sink.images(), fps


class _Steps:
    """Shows steps in ComfyUI, and raises what ComfyUI raises to stop."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, step: int, total: int, latents: Tensor) -> None:
        """After a step."""
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total)
        self.bar.update_absolute(step, total)
        comfy.model_management.throw_exception_if_processing_interrupted()


class _Frames:
    """Takes decoded frames, see ``opensora.diffusion.decode.FrameSink``; shows and stops as steps do."""

    def __init__(self, total: int) -> None:
        self.parts: list[np.ndarray] = []
        self.total, self.bar = total, comfy.utils.ProgressBar(total)

    def start(self, sample: int) -> None:
        """What came so far is void."""
        self.parts = []

    def write(self, frames: np.ndarray) -> None:
        """Further frames, uint8 [T, H, W, 3]."""
        self.parts.append(frames)
        self.bar.update_absolute(sum(map(len, self.parts)), self.total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def images(self) -> Tensor:
        """All frames as ComfyUI has pictures."""
        import numpy as np
        import torch

        return torch.from_numpy(np.concatenate(self.parts)).float() / 255


def _pixels(images: Tensor) -> np.ndarray:
    """ComfyUI's pictures [T, H, W, C] in 0..1 as uint8 [T, H, W, 3]."""
    pixels: np.ndarray = (images[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return pixels


def _condition(first: bool, last: bool, clip: bool) -> str:
    """What references fix, by those that are there."""
    if clip:
        return "v2v_head"
    return {(True, True): "i2v_loop", (True, False): "i2v_head", (False, True): "i2v_tail"}.get((first, last), "t2v")


def _make_room() -> None:
    """Take what ComfyUI has loaded off the GPU, whose memory ComfyUI and opensora do not share out between them."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


NODE_CLASS_MAPPINGS = {
    "OpenSoraLoader": OpenSoraLoader,
    "OpenSoraLora": OpenSoraLora,
    "OpenSoraPrompt": OpenSoraPrompt,
    "OpenSoraSampler": OpenSoraSampler,
    "OpenSoraDecode": OpenSoraDecode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "OpenSoraLoader": "Open-Sora: load pipeline",
    "OpenSoraLora": "Open-Sora: LoRA",
    "OpenSoraPrompt": "Open-Sora: prompt",
    "OpenSoraSampler": "Open-Sora: sample",
    "OpenSoraDecode": "Open-Sora: decode",
}
