"""Everything about a diffusion training config that can be wrong, found before any model is built."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from opensora.acceleration.devices import torch_dtype
from opensora.acceleration.plugins import NATIVE, check_training
from opensora.config.choices import CONDITIONS, METHODS
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.config.keys import read_group
from opensora.config.options import Options
from opensora.datasets.buckets import BucketTable
from opensora.diffusion.windows import check_length
from opensora.models.autoencoder import Autoencoder, LatentSpec, check_buckets
from opensora.models.build import MAX_CPU_PARAMETERS, build_on_meta, check_all_weights, count_parameters
from opensora.models.diffusion import DiffusionModel, as_diffusion_model
from opensora.models.mmdit.attention import check_trains
from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.mmdit.model import MMDiTModel
from opensora.models.quantization.loading import kind_of_section
from opensora.models.text.files import check_text_widths
from opensora.training.checks import check_loop, check_optimizer
from opensora.training.diffusion.encoders import encoders_to_load, meta_autoencoder
from opensora.training.diffusion.inputs import InputOptions
from opensora.training.diffusion.objective import check_objective
from opensora.training.diffusion.samples import sampling_config
from opensora.training.diffusion.validation import check_validation
from opensora.training.methods.base import TrainingMethod
from opensora.training.report.trackers import check_trackers
from opensora.training.weights.adapters import LoraAdapter, freeze, read_adapter
from opensora.training.weights.groups import check_groups
from opensora.utils.errors import UserError
from opensora.utils.weights import open_weights
from opensora.utils.weights_loading import check_match

SECTIONS = ("model", "ae", "t5", "clip", "dataset", "bucket_config", "optim")


@dataclass(frozen=True)
class TrainingPlan:
    """What `check_config` found out. The models have no weights; they are built once, for all who ask them for sizes.

    Attributes:
        inputs: numbers of the training objective.
        model: the diffusion model.
        ae: the autoencoder.
        method: what is minimised.
        method_options: its settings.
        samples: inference config of the videos to make on the way, None for none.
    """

    inputs: InputOptions
    model: DiffusionModel
    ae: Autoencoder
    method: type[TrainingMethod]
    method_options: Options
    samples: InferenceOptions | None


def check_config(cfg: TrainOptions, world_size: int = 1) -> TrainingPlan:
    """Check a resolved training config, except for its table, its weights and its checkpoint.

    Args:
        cfg: resolved config.
        world_size: number of processes.

    Raises:
        UserError: names the key and what would be right.
    """
    for key in SECTIONS:
        if not getattr(cfg, key) or (key == "optim" and not cfg.optim.given):
            raise UserError(f"{cfg.config_path}: '{key}' is missing; training needs {', '.join(SECTIONS)}")
    assert cfg.model is not None
    assert cfg.bucket_config is not None
    check_loop(cfg)
    if torch_dtype(cfg.dtype) == torch.float16:
        raise UserError(f"dtype={cfg.dtype}: training works in bf16 (with fp32 master weights) or fp32")
    model, ae = as_diffusion_model(build_on_meta(cfg.model)), meta_autoencoder(cfg)
    if isinstance(model.config, MMDiTConfig):
        check_trains(model.config.attn_backend)
    _check_conditions(cfg, model)
    _check_sizes(cfg, model, ae)
    if cfg.window is not None:
        check_length(cfg.window, "window", LatentSpec.of(ae))
    check_buckets(cfg.bucket_config, ae)
    multiple = ae.compression[1] * cfg.patch_size
    BucketTable(cfg.bucket_config, multiple)
    _check_trained(cfg, copy.deepcopy(model))
    check_training(cfg.plugin, cfg.plugin_config, model, world_size)
    check_trackers(cfg)
    check_validation(cfg)
    method = METHODS.get(cfg.training_method)
    if not (isinstance(method, type) and issubclass(method, TrainingMethod)):
        raise UserError(f"training_method={cfg.training_method}: {method!r} is no class derived from TrainingMethod")
    _check_parts(cfg, world_size, method)
    _check_streamed(cfg, world_size, method, model)
    check_objective(cfg, method)
    options = read_group(method.options, cfg.training_method_config or {}, "training_method_config", cfg.config_path)
    method.check(cfg, options, model)
    samples = sampling_config(cfg) if cfg.samples else None
    return TrainingPlan(_input_options(cfg, multiple), model, ae, method, options, samples)


def _input_options(cfg: TrainOptions, multiple: int) -> InputOptions:
    dropout = cfg.dropout_ratio
    return InputOptions(
        patch_size=cfg.patch_size,
        spatial_multiple=multiple,
        sigma_min=cfg.sigma_min,
        guidance=cfg.guidance,
        no_i2v_ref_loss=cfg.no_i2v_ref_loss,
        t5_dropout=dropout.t5 if dropout else 0.0,
        clip_dropout=dropout.clip if dropout else 0.0,
        condition_weights=dict(cfg.condition_config) if cfg.condition_config else None,
        window=cfg.window,
        time_sampling=cfg.time_sampling,
        loss_weighting=cfg.loss_weighting,
    )


def _check_conditions(cfg: TrainOptions, model: DiffusionModel) -> None:
    weights = cfg.condition_config
    if weights and not sum(weights.values()):
        raise UserError("condition_config: all weights are 0; give one above that, or none to train on text only")
    for name in weights or {}:
        if name not in CONDITIONS:
            raise UserError(f"condition_config: unknown condition {name!r}; valid: {CONDITIONS.listing}")
    if bool(weights) != bool(model.config.cond_embed):
        raise UserError(
            "condition_config and model.cond_embed belong together: set both (image conditions) or neither (text only)"
        )
    if cfg.window is not None and not weights:
        raise UserError("window: windows go on from given latents; set condition_config, or leave window out")


def _check_sizes(cfg: TrainOptions, model: DiffusionModel, ae: Autoencoder) -> None:
    """Channels, patches and text widths of the sections against each other."""
    patch, channels = cfg.patch_size, ae.latent_channels
    expected = channels * patch**2
    if model.config.in_channels != expected:
        raise UserError(
            f"model.in_channels={model.config.in_channels} does not fit: {channels} latent channels in patches of "
            f"{patch}x{patch} make {expected}"
        )
    if model.config.cond_embed and model.config.patch_size != patch:
        raise UserError(f"patch_size={patch} and model.patch_size={model.config.patch_size} must be equal")
    check_text_widths(model.config, {name: getattr(cfg, name) for name in ("t5", "clip")})


def _check_trained(cfg: TrainOptions, model: nn.Module) -> None:
    """What is trained: LoRA, frozen parts. Changes ``model``, which is on the meta device."""
    if cfg.lora_checkpoint and not cfg.lora_config:
        raise UserError("lora_checkpoint is set without lora_config: give both, to train an adapter")
    kind = kind_of_section(cfg.model)
    if kind is not None and not cfg.lora_config:
        raise UserError(
            f"model: weights in {kind} are for sampling; train with weights that are not quantised, or an adapter on "
            "them (lora_config)"
        )
    if not cfg.lora_config and cfg.lora_dtype != "fp32":
        raise UserError(f"lora_dtype={cfg.lora_dtype} is set without lora_config: it is the precision of adapters")
    if torch_dtype(cfg.lora_dtype) not in (torch.float32, torch_dtype(cfg.dtype)):
        raise UserError(f"lora_dtype={cfg.lora_dtype} and dtype={cfg.dtype}: adapters compute as the model, or in fp32")
    if not cfg.lora_config:
        freeze(model, cfg.freeze_layers)
        check_groups(model.named_parameters(), cfg.optim)
        return
    if cfg.freeze_layers:
        raise UserError("freeze_layers and lora_config: an adapter leaves all of the model's weights frozen; set one")
    if cfg.model is None or not cfg.model.from_pretrained:
        raise UserError("lora_config: an adapter needs a trained model; give its weights with --model.from_pretrained")
    LoraAdapter(model, cfg.lora_config, cfg.lora_checkpoint)
    check_groups(model.named_parameters(), cfg.optim)


def _check_parts(cfg: TrainOptions, world_size: int, method: type[TrainingMethod]) -> None:
    """Raises a UserError for what cannot be divided over processes."""
    check_optimizer(cfg, world_size)
    if world_size == 1 or not cfg.lora_config:
        return
    if cfg.plugin not in NATIVE or cfg.plugin_config.tp_size > 1:
        raise UserError(
            "lora_config: adapters are trained with the model whole on every rank (--plugin ddp) or divided over all "
            "(--plugin fsdp2), with plugin_config.tp_size=1"
        )
    if cfg.plugin == "fsdp2" and method.adds_adapters:
        raise UserError(
            f"training_method={cfg.training_method} adds an adapter of its own, which fsdp2 does not divide: use "
            "--plugin ddp, or train without lora_config"
        )
    if cfg.plugin == "fsdp2" and kind_of_section(cfg.model) == "fp8" and cfg.lora_dtype != "fp32":
        raise UserError(
            f"lora_dtype={cfg.lora_dtype} with plugin fsdp2, which would round fp8 weights too: use lora_dtype=fp32, "
            "--plugin ddp, or --model.quantize int8 or nf4"
        )


def _check_streamed(cfg: TrainOptions, world_size: int, method: type[TrainingMethod], model: DiffusionModel) -> None:
    """Raises a UserError where blocks cannot come and go."""
    if not cfg.weights_memory:
        return
    blocks, chosen = model.blocks_in_order(), getattr(cfg.model, "grad_ckpt_settings", None)
    kept = (
        chosen is not None
        and isinstance(model, MMDiTModel)
        and any(number < len(of_kind) for number, of_kind in zip(chosen, (model.double_blocks, model.single_blocks)))
    )
    wrong = {
        "an adapter, under which weights are frozen: set lora_config": not cfg.lora_config,
        "grad_checkpoint=True: a block comes again for its backward pass": not cfg.grad_checkpoint,
        "all blocks to recompute: leave model.grad_ckpt_settings out, or give (100, 100)": kept,
        "one process: leave it out and divide the weights by --plugin fsdp2": world_size > 1,
        "no samples on the way: make them of a checkpoint with scripts/diffusion/inference.py": bool(cfg.samples),
        f"another training_method than {cfg.training_method}, which adds an adapter": method.adds_adapters,
        "a model that says which its blocks are (blocks_in_order)": not blocks,
    }
    for need, applies in wrong.items():
        if applies:
            raise UserError(f"weights_memory={cfg.weights_memory} needs {need}")


def check_resources(
    cfg: TrainOptions, model: DiffusionModel, ae: Autoencoder, device: torch.device, resume: Path | None
) -> None:
    """See that weights are there, readable and of this architecture, and that the device is up to the model.

    Args:
        cfg: resolved config.
        model: its diffusion model, on the meta device.
        ae: its autoencoder, likewise.
        device: where it will train.
        resume: checkpoint to resume from.

    Raises:
        UserError: says what to download, which key to change, or what to use instead.
    """
    assert cfg.model is not None
    if device.type == "cpu" and cfg.device is None:
        parameters = count_parameters(model)
        if parameters > MAX_CPU_PARAMETERS:
            raise UserError(
                f"no GPU found, and this config's model has {parameters / 1e9:.1f}B parameters; use "
                "configs/diffusion/train/demo_cpu.py for a model that trains on a CPU, or --device cpu to insist"
            )
    own = ["model"] if resume is None or cfg.lora_config else []  # a checkpoint of a model has all of its weights
    sections = {name: getattr(cfg, name) for name in (*own, *encoders_to_load(cfg))}
    check_all_weights(sections, {"model": model, "ae": ae})
    if resume is not None and not cfg.lora_config:
        if not (resume / "model").is_dir():
            raise UserError(f"--load {resume}: it holds an adapter, not a model; set lora_config as in its config.txt")
        check_architecture(model, resume / "model" / "model.safetensors")
    if resume is not None and cfg.lora_config:
        read_adapter(resume / "lora")


def check_architecture(model: DiffusionModel, path: Path) -> None:
    """Compare weights on disk with a model on the meta device, before either is loaded.

    Raises:
        UserError: names the config keys that differ.
    """
    check_match(
        model,
        open_weights(path),
        explain=model.explain_mismatch,
        metadata=model.file_metadata(),
    )
