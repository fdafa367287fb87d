"""A saved pipeline as one of diffusers, for ``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)``.

Everything is computed by :class:`opensora.diffusion.pipeline.VideoPipeline`, so that the frames are the same. Needs
diffusers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import nn

from opensora.acceleration.devices import dtype_name
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.calling import Generators
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.diffusion.references import References
from opensora.diffusion.result import SampleResult
from opensora.diffusion.saving import CONFIG, FOLDERS
from opensora.models.build import build_ready, check_weights
from opensora.models.quantization.loading import tell
from opensora.utils.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepEnd = Callable[["OpenSoraPipeline", int, int, dict[str, Any]], Any]


class Part(nn.Module):
    """A part of a saved pipeline, with the folder that it is from.

    Args:
        module: the model itself.
        folder: of the whole pipeline.
    """

    def __init__(self, module: nn.Module, folder: Path) -> None:
        super().__init__()
        self.module, self.folder = module, folder

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **_: Any) -> "Part":
        """Load the part of a folder; diffusers calls this.

        Raises:
            UserError: weights are missing, damaged or of another model.
        """
        path = Path(folder)
        name = next(key for key, part in FOLDERS.items() if part == path.name)
        run = _prepared(path.parent, torch_dtype)
        section = run.sections[name]
        check_weights(name, section, run.models.get(name))
        module = build_ready(section, run.device, run.dtype, name)
        tell(name, module, run.device)
        return cls(module, path.parent)


def _prepared(folder: Path, dtype: torch.dtype | None) -> PreparedRun:
    """The run of a pipeline's folder on the CPU, where diffusers loads."""
    overrides = {} if dtype is None else {"dtype": dtype_name(dtype)}
    return PreparedRun.of(load_config(folder / CONFIG, InferenceOptions, overrides), torch.device("cpu"))


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """Videos, each a list of pictures ("pil"), an array [T, H, W, C] in 0..1 ("np"), a tensor [T, C, H, W] in 0..1
    ("pt") or latents ("latent")."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):
    """Prompts (and pictures, and clips) to videos.

    Args:
        transformer, vae, text_encoder, text_encoder_2: parts of the same folder.
        tokenizer, tokenizer_2: of the text encoders, which have them too.
        image_transformer, image_vae: of the picture that a video starts from, if the pipeline makes one.
    """

    _optional_components = ["image_transformer", "image_vae"]

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        text_encoder_2: nn.Module,
        tokenizer: Any,
        tokenizer_2: Any,
        image_transformer: nn.Module | None = None,
        image_vae: nn.Module | None = None,
    ) -> None:
        super().__init__()
        parts = {
            **{"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2},
            **{"image_transformer": image_transformer, "image_vae": image_vae},
        }
        given = {name: part for name, part in parts.items() if isinstance(part, Part)}
        if any(part is not None and name not in given for name, part in parts.items()):
            raise UserError("the parts of this pipeline come from its folder; give none of your own")
        modules = {key: given[folder].module for key, folder in FOLDERS.items() if folder in given}
        run = _prepared(given["transformer"].folder, next(modules["model"].parameters()).dtype)
        self.video = VideoPipeline(modules, run.cfg, run.device, run.dtype, None, run.distilled, run.plain)
        self.register_modules(  # type: ignore[attr-defined]
            **{name: given[name].module if name in given else None for name in parts},
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
        )

    def to(self, *args: Any, **kwargs: Any) -> "OpenSoraPipeline":
        """Move to a device, or another precision, or both."""
        self.video.to(
            *args, *(kwargs[key] for key in ("device", "dtype", "torch_dtype") if kwargs.get(key) is not None)
        )
        return self

    @property
    def device(self) -> torch.device:
        """Where the models work."""
        return self.video.device

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = "cuda") -> None:
        """Have every model on the GPU only while it works (``offload=True``)."""
        self._offload(True, gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = "cuda") -> None:
        """Have every block on the GPU only while it works (``offload="blocks"``)."""
        self._offload("blocks", gpu_id, device)

    def _offload(self, how: Any, gpu_id: int | None, device: Any) -> None:
        self.video.cfg = replace(self.video.cfg, offload=how)
        self.video.to(device if gpu_id is None else f"{torch.device(device).type}:{gpu_id}")

    def load_lora_weights(self, path: str | Path, weight: float = 1.0) -> None:
        """Put an adapter on the transformer: of PEFT, diffusers, ComfyUI or Kohya; see ``VideoPipeline.load_lora``."""
        self.video.load_lora(path, weight)

    def unload_lora_weights(self) -> None:
        """Take all adapters off."""
        self.video.unload_lora()

    def save_pretrained(self, save_directory: str | Path, *_: Any, **kwargs: Any) -> None:
        """Write the pipeline as a folder, see ``VideoPipeline.save_pretrained``.

        Raises:
            UserError: options of diffusers that there are none of here, such as shards.
        """
        if kwargs.get("push_to_hub"):
            raise UserError("save_pretrained: push_to_hub is a method of its own")
        self.video.save_pretrained(save_directory, overwrite=True)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Send the pipeline to a hub, see ``VideoPipeline.push_to_hub``."""
        return self.video.push_to_hub(repo_id, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: References | Sequence[References | None] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        **more: Any,
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Make a video of each prompt.

        Args:
            prompt: one text, or a batch of them.
            image: picture of the first frame, or what ``cond_type`` says; see ``VideoPipeline``.
            negative_prompt: one for all or one each.
            height, width, num_frames, num_inference_steps, guidance_scale: None takes what ``config.json`` says.
            generator: of the noise, one for all or one each.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False gives a tuple.
            callback_on_step_end: ``callback(pipe, step, left, {"latents": latents})`` after each step, counted from 0,
                with the number of those left; what it returns is not used, what it raises stops the run.
            more: further arguments of ``VideoPipeline`` (``seed``, ``cond_type``, ``fps``, ``guidance_img``, ...).

        Raises:
            UserError: see ``VideoPipeline``, or an output type that there is none of.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        sizes: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}

        def on_step(step: int, total: int, latents: torch.Tensor) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(self, step - 1, total - step, {"latents": latents})

        if getattr(self, "_progress_bar_config", {}).get("disable"):
            more = {"progress": False, **more}
        result = self.video(
            prompt, image=_pixels(image), negative_prompt=negative_prompt, generator=generator, on_step=on_step,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, decode=output_type != "latent",
            **{key: value for key, value in sizes.items() if value is not None}, **more,
        )  # fmt: skip
        frames = _as_output(result, output_type)
        return OpenSoraPipelineOutput(frames=frames) if return_dict else (frames,)


def _pixels(image: Any) -> Any:
    """References as ``VideoPipeline`` takes them: pictures of PIL as arrays, also in lists."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return [_pixels(each) for each in image] if isinstance(image, list) else image


def _as_output(result: SampleResult, output_type: str) -> Any:
    if output_type == "latent":
        return result.latents
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in result.frames]
    videos = np.stack(result.frames).astype(np.float32) / 255  # [B, T, H, W, C]
    return videos if output_type == "np" else torch.from_numpy(videos).permute(0, 1, 4, 2, 3).contiguous()
