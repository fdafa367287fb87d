"""The models of a prepared run, with their weights."""

import torch
from torch import nn

from opensora.acceleration.compile import compile_and_tell
from opensora.acceleration.materialise import materialise
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.parallel_vae import share_tiles
from opensora.acceleration.plugins import divide_model
from opensora.acceleration.scratch import ScratchFile
from opensora.acceleration.shardformer import use_shardformer
from opensora.acceleration.sharding import WeightLayout
from opensora.diffusion.fitting import blocks_of
from opensora.diffusion.lora import apply_loras, attach_loras, tell_loras, with_loras
from opensora.diffusion.prepared import TEXT_ENCODERS, PreparedRun
from opensora.models.autoencoder import as_autoencoder
from opensora.models.build import build_ready
from opensora.models.diffusion import DiffusionModel, as_diffusion_model
from opensora.models.quantization.loading import tell


def load_models(run: PreparedRun, parallel: ParallelContext | None = None) -> dict[str, nn.Module]:
    """Models by name, with adapters, on the device (on the CPU with ``offload``, and modulation with ``precompute``).

    Args:
        run: what is known of them.
        parallel: ranks that make a sample together; the models are divided over them, and the first of them alone
            has the text encoders.
    """
    cfg = run.cfg
    home = torch.device("cpu") if cfg.offload else run.device
    embeds = parallel is None or parallel.sample.first
    scratch = ScratchFile() if cfg.offload == "disk" else None
    while_read = run.quantized or (scratch is not None and run.sections["model"].type == "flux")
    in_parts = not while_read and _is_read_in_parts(run, parallel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # for models that start from random weights
        models: dict[str, nn.Module] = {}
        for name, section in run.sections.items():
            if not embeds and name in TEXT_ENCODERS:
                continue
            changed = name == "model" and while_read
            place = "meta" if name == "model" and in_parts else home
            models[name] = _changed(run, home, scratch) if changed else build_ready(section, place, run.dtype, name)
            if place != "meta" and cfg.precompute and isinstance(models[name], DiffusionModel):
                park_modulation(models[name])
    for name in set(TEXT_ENCODERS) & models.keys():
        use_shardformer(models[name])
    if not while_read and not in_parts:
        apply_loras(models["model"], run.adapters(models["model"]), cfg.merge_lora)
    for name, model in models.items():
        tell(name, model, run.device)
    if parallel is not None:
        layout = divide_model(models["model"], parallel, cfg.plugin_config)
        if in_parts:
            _fill_parts(run, models["model"], layout, parallel, home)
        if cfg.plugin_ae == "hybrid":
            share_tiles(as_autoencoder(models["ae"]), parallel.sample)
    if scratch is not None:
        for model in models.values():
            scratch.take(blocks_of(model))
    for name in [name for name, model in models.items() if cfg.compile and isinstance(model, DiffusionModel)]:
        compile_and_tell(models[name], name)
    return models


def _is_read_in_parts(run: PreparedRun, parallel: ParallelContext | None) -> bool:
    """Whether tensor-parallel ranks read only what they keep of the video model's weights. Adapters that stay beside
    these are refused where it is divided."""
    beside = bool(run.cfg.pretrained_lora_path) and not run.cfg.merge_lora
    divided = parallel is not None and parallel.tp.size > 1
    return divided and not beside and bool(run.sections["model"].from_pretrained)


def _fill_parts(
    run: PreparedRun, model: nn.Module, layout: WeightLayout, parallel: ParallelContext, home: torch.device
) -> None:
    """The weights of the divided video model, changed by adapters while they are read."""
    adapters = run.adapters(run.model)

    def build() -> nn.Module:
        return build_ready(run.sections["model"], "cpu", run.dtype, "model")

    materialise(model, layout, parallel, build, with_loras(adapters) if adapters else None, home)
    tell_loras(adapters)
    if run.cfg.precompute and isinstance(model, DiffusionModel):
        park_modulation(model)


def park_modulation(model: nn.Module) -> None:
    """Leave a model's modulation layers in host memory, from where they are copied when they work: once per sample."""
    for layer in as_diffusion_model(model).modulation_layers().values():
        layer.to("cpu")


def _changed(run: PreparedRun, home: torch.device, scratch: ScratchFile | None) -> nn.Module:
    """The video model with adapters, which change its weights while they are read: before they are quantised, or go to
    the disk."""
    adapters, merge = run.adapters(run.model), run.cfg.merge_lora
    change = with_loras(adapters, merge)
    filed = change if scratch is None else lambda key, value: scratch.keep(change(key, value))
    model = build_ready(run.sections["model"], home, run.dtype, "model", filed)
    tell_loras(adapters)
    if not merge:
        attach_loras(model, adapters)
    return model
