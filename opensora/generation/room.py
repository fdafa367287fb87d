"""What a run needs of memory and disk, from its plan, and whether that is there."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.acceleration.memory import memory_of
from opensora.diffusion.fitting import check_fit, device_room, parts_of_run, rows_at_once, streams, tensor_sizes
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.prepared import TEXT_ENCODERS, PreparedRun, text_length
from opensora.generation.requests import Request
from opensora.models.autoencoder import as_autoencoder
from opensora.models.build import count_parameters
from opensora.models.quantization.loading import kind_of_section, stored_kind
from opensora.models.text.files import t5_shapes
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.sizes import parse_bytes, size_text
from opensora.utils.weights import read_header

logger = get_logger(__name__)

PIXEL_BYTES = 5  # of a decoded video, three times: as fp32 and as uint8
FILE_BITS = 0.1  # of a pixel in an mp4, about


@dataclass(frozen=True)
class Needs:
    """What a run needs, about, in bytes.

    Attributes:
        weights: of all models that are on the device at once.
        activations: of the diffusion model while it samples a batch.
        pixels: of a batch of decoded videos, in host memory.
        latents: all files of latents that are to be kept; exact.
        videos: all files of videos.
    """

    weights: float
    activations: float
    pixels: float
    latents: float
    videos: float

    @classmethod
    def of(cls, run: PreparedRun, plans: Sequence[SamplePlan], samples: int) -> "Needs":
        """Needs of a prepared run whose prompts ask for these plans, the most of all.

        Args:
            samples: videos to make.
        """
        cfg, counts = run.cfg, parameter_counts(run)[0]
        frames = max(plan.num_frames * plan.height * plan.width for plan in plans)
        channels = as_autoencoder(run.models["ae"]).latent_channels
        latent = max(math.prod(plan.whole_latent) for plan in plans) * channels * 4
        length = max(plan.length * plan.height * plan.width for plan in plans)
        in_windows = max((latent for plan in plans if plan.windows is not None), default=0)  # while they are made
        # on a CPU they are at home, unless that is the disk
        on_demand = cfg.offload and (run.device.type != "cpu" or cfg.offload == "disk")
        weights = {name: weight_bytes(run, name, count) for name, count in counts.items()}
        if streams(cfg) and on_demand:
            room = device_room(cfg, run.device)
            weights |= {parts.name: parts.weights(room) for parts in parts_of_run(run, plans)}
        return cls(
            weights=(max if on_demand else sum)(weights.values()),
            activations=max(activations_of(run, plan) for plan in plans),
            pixels=float(cfg.batch_size * 3 * frames * PIXEL_BYTES),
            latents=float((samples * latent if cfg.save_latents else 0) + cfg.batch_size * in_windows),
            videos=samples * length * FILE_BITS / 8,
        )


def parameter_counts(run: PreparedRun) -> tuple[dict[str, int], list[str]]:
    """Parameters of each model, and the text encoders of which they cannot be told."""
    counts: dict[str, int] = {name: count_parameters(model) for name, model in run.models.items()}
    found = {name: encoder_parameters(run.sections[name].from_pretrained) for name in TEXT_ENCODERS}
    counts |= {name: count for name, count in found.items() if count is not None}
    return counts, [name for name, count in found.items() if count is None]


def weight_bytes(run: PreparedRun, name: str, count: int) -> int:
    """Memory of the weights of a model that has ``count`` parameters, quantised where they are or shall be."""
    section = run.sections[name]
    if kind_of_section(section) is None:
        return count * run.dtype.itemsize
    if name in run.models:
        shapes = {key: tuple(parameter.shape) for key, parameter in run.models[name].named_parameters()}
    else:
        shapes = t5_shapes(Path(section.from_pretrained or "").expanduser())
    return sum(tensor_sizes(run, name, shapes).values())


def encoder_parameters(path: str | None) -> int | None:
    """Parameters of a text encoder, from the headers of its safetensors files; None where there are none."""
    folder = Path(path or "").expanduser()
    if path and stored_kind(path) is not None:  # tensors that stand for weights are of other shapes
        return sum(map(math.prod, t5_shapes(folder).values()))
    headers = [read_header(file) for file in folder.glob("*.safetensors")] if path else []
    shapes = [
        tensor["shape"]
        for header in headers
        for key, tensor in header.items()
        # of whole models, only the half that reads text is loaded
        if key != "__metadata__" and not key.startswith(("vision_model.", "visual_projection.", "decoder."))
    ]
    return sum(map(math.prod, shapes)) if shapes else None


def activations_of(run: PreparedRun, plan: SamplePlan) -> float:
    """Bytes of activations of the rows that the diffusion model works on at once."""
    rows = rows_at_once(plan, run.cfg.batch_size)
    return run.model.activation_bytes(plan.tokens + text_length(run.sections["t5"]), rows, run.dtype)


def check_room(run: PreparedRun, requests: Sequence[Request]) -> None:
    """Compare what a run needs with the memory and the disk that are there; the log says what will be short.

    Raises:
        UserError: it cannot work: more than the machine's memory on a CPU, or latents that the disk has no room for.
    """
    plans = run.plans(request.cond_type for request in requests)
    check_fit(run, plans)
    needs = Needs.of(run, plans, len(requests) * run.cfg.num_sample)
    _check_memory(run, needs)
    _check_disk(run, needs)


def _check_memory(run: PreparedRun, needs: Needs) -> None:
    on_cpu = run.device.type == "cpu"
    if run.cfg.plugin == "hybrid" and not on_cpu:
        return  # devices share the work
    total, available = memory_of(run.device)
    limit = parse_bytes(run.cfg.gpu_memory, "gpu_memory")
    if limit is not None and not on_cpu:
        available = min(available, limit)
    need = needs.weights + (max(needs.activations, needs.pixels) if on_cpu else needs.activations)
    advice = "fewer frames, a smaller resolution or batch_size" + (
        " need less" if on_cpu else ", or --offload True (or blocks) need less"
    )
    told = f"the run needs about {size_text(need)} of memory ({size_text(needs.weights)} of weights)"
    if need > total and on_cpu:
        raise UserError(f"{told}, and this machine has {size_text(total)}: {advice}")
    if need > available:
        left = f"{size_text(available)} of {size_text(total)}"
        logger.warning("%s, and %s has %s left: %s", told, run.device, left, advice)


def _check_disk(run: PreparedRun, needs: Needs) -> None:
    folder = Path(run.cfg.save_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needs.latents > free:
        raise UserError(
            f"save_dir {run.cfg.save_dir}: the latents to keep are {size_text(needs.latents)}, and {folder} has "
            f"{size_text(free)} left: make fewer at a time, or write elsewhere"
        )
    if needs.latents + needs.videos > free:
        need, left = size_text(needs.latents + needs.videos), size_text(free)
        logger.warning("save_dir %s: the files are about %s, and %s is left there", run.cfg.save_dir, need, left)
