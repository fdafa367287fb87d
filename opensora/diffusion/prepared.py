"""A sampling run before any weight is loaded: all that can be known and wrong of it, found out once and handed on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from opensora.acceleration.compile import check_compiler
from opensora.acceleration.devices import torch_dtype
from opensora.acceleration.plugins import check_sizes, plugin_name
from opensora.config.commands import InferenceOptions
from opensora.config.options import ModelOptions, SamplingOption
from opensora.diffusion.conditions import takes_references
from opensora.diffusion.distilled import Distilled, as_distilled, find_distilled
from opensora.diffusion.lora import check_quantized, read_loras
from opensora.diffusion.lora_fit import Adapter
from opensora.diffusion.plan import SamplePlan, image_plan, make_plan, starts_from_picture
from opensora.diffusion.wording import check_motion_score
from opensora.models.autoencoder import LatentSpec, as_autoencoder
from opensora.models.build import build_on_meta, check_all_weights, check_capacity
from opensora.models.diffusion import DiffusionConfig, DiffusionModel, as_diffusion_model
from opensora.models.quantization.loading import kind_of_section, stored_kind
from opensora.models.text.config import TextEmbedderConfig
from opensora.models.text.files import check_text_widths
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

TEXT_ENCODERS = ("t5", "clip")


@dataclass(frozen=True)
class PreparedRun:
    """A sampling config whose models, sizes and lengths are known to go together.

    Attributes:
        cfg: the config; its sampling options are those of a distilled model, if it is one.
        device: where the models will work.
        dtype: of the models.
        sections: config section of each model that the run needs, by name.
        models: the same models without weights, on meta; none of the text encoders.
        plan: a sample of the config's own condition.
        picture: the picture that it starts from (``use_t2i2v``), else None.
        distilled: what the video model says of itself, if it is distilled.
        plain: sampling options as the config says, which a picture that comes first still goes by.
    """

    cfg: InferenceOptions
    device: torch.device
    dtype: torch.dtype
    sections: Mapping[str, ModelOptions]
    models: Mapping[str, nn.Module]
    plan: SamplePlan
    picture: SamplePlan | None = None
    distilled: Distilled | None = None
    plain: SamplingOption | None = None

    @classmethod
    def of(cls, cfg: InferenceOptions, device: torch.device) -> "PreparedRun":
        """Check the models, sizes and lengths of a config, and keep what that takes.

        Raises:
            UserError: says what is wrong and what would be right.
        """
        dtype, sections = torch_dtype(cfg.dtype), needed_sections(cfg)
        check_motion_score(cfg.motion_score, "config")
        models = {name: build_on_meta(sections[name]) for name in ("model", "ae")}
        spec = LatentSpec.of(models["ae"])
        cfg = in_frames(cfg, spec)
        plain = cfg.sampling_option
        distilled = find_distilled(cfg)
        if distilled is not None:
            cfg = replace(cfg, sampling_option=as_distilled(plain, distilled, _chosen(cfg)))
            logger.info("%s", distilled.describe(cfg.sampling_option))
        plan = make_plan(cfg.sampling_option, spec, cfg.patch_size, "t2v", distilled=distilled)
        check_goes_on(models["model"], plan)
        _check_channels(cfg, models["model"], models["ae"])
        fixed = distilled is not None and distilled.scales == "fixed"
        if plan.method == "distill" and not fixed and not _config(models["model"]).guidance_embed:
            logger.warning("method distill: the model has no guidance_embed, so that guidance has no effect")
        if plan.step_cache is not None and not as_diffusion_model(models["model"]).takes_step_cache:
            kind = type(models["model"]).__name__
            raise UserError(f"sampling_option.step_cache={plan.step_cache.kind}: {kind} takes no step cache")
        if plan.step_cache is not None:
            logger.info("step cache %s: approximate, some evaluations leave blocks out", plan.step_cache)
        cond_type = starts_from_picture(cfg.cond_type) if cfg.use_t2i2v else cfg.cond_type
        if takes_references(cond_type):
            check_takes_references(models["model"], cond_type)
            plan = make_plan(cfg.sampling_option, spec, cfg.patch_size, cond_type, distilled=distilled)
        picture = None
        if cfg.use_t2i2v:
            models |= {name: build_on_meta(sections[name]) for name in ("img_flux", "img_flux_ae")}
            picture = plan_picture(cfg, models, plain)
        return cls(cfg, device, dtype, sections, models, plan, picture, distilled, plain)

    @property
    def model(self) -> DiffusionModel:
        """The video model, on meta."""
        return as_diffusion_model(self.models["model"])

    @property
    def quantized(self) -> str | None:
        """Kind of the video model's weights, None where they are not quantised."""
        return kind_of_section(self.sections["model"])

    def plans(self, cond_types: Iterable[str]) -> list[SamplePlan]:
        """One for each condition that prompts ask for, which the model and the length must suit.

        Raises:
            UserError: a condition that cannot be.
        """
        plans = []
        for cond_type in sorted(set(cond_types)):
            if takes_references(cond_type):
                check_takes_references(self.models["model"], cond_type)
            option, spec = self.cfg.sampling_option, self.plan.spec
            plans.append(make_plan(option, spec, self.cfg.patch_size, cond_type, distilled=self.distilled))
        return plans

    def check_resources(self) -> None:
        """See that weights and adapters are there, readable and of these models, and that the device is up to them.

        Raises:
            UserError: says what to download, which key to change or what to use instead.
        """
        check_capacity(self.models["model"], self.device, self.cfg.device)
        if self.cfg.compile:
            check_compiler(self.device)
        adapters = partial(self.adapters, self.models["model"])
        check_all_weights(self.sections, self.models, pretrained_lora_path=adapters)
        check_text_widths(self.model.config, self.sections)

    def adapters(self, model: nn.Module) -> list[Adapter]:
        """Those of the config, for its video model.

        Raises:
            UserError: one does not fit, see :func:`opensora.diffusion.lora.read_loras`.
        """
        adapters = read_loras(self.cfg.pretrained_lora_path, model, self.cfg.lora_partial)
        section = self.sections["model"]
        if adapters and stored_kind(section.from_pretrained) is not None:
            check_quantized(adapters, self.cfg.merge_lora, section.from_pretrained)
        return adapters


def _chosen(cfg: InferenceOptions) -> set[str]:
    """Sampling keys that the command line set."""
    return {key.removeprefix("sampling_option.") for key in cfg.chosen if key.startswith("sampling_option.")}


def plan_picture(
    cfg: InferenceOptions, models: Mapping[str, nn.Module], option: SamplingOption | None = None
) -> SamplePlan:
    """Run of the image model before a video of these sampling options (default: the config's); meta models will do."""
    spec, patch_size = LatentSpec.of(models["img_flux_ae"]), _config(models["img_flux"]).patch_size
    return image_plan(option or cfg.sampling_option, cfg.img_resolution, spec, patch_size)


def text_length(encoder: ModelOptions | None) -> int:
    """Tokens that the text encoder of a section makes of every text."""
    if isinstance(encoder, TextEmbedderConfig):
        return encoder.max_length
    extra = encoder.extra if encoder is not None else {}
    return extra.get("max_length", TextEmbedderConfig.max_length)


def check_parallelism(cfg: InferenceOptions, model: nn.Module, world_size: int) -> None:
    """See that a config's parallelism suits its model (on meta will do) and the number of processes.

    Raises:
        UserError: unknown plugins, or sizes that do not divide the model.
    """
    for key, plugin in (("plugin", cfg.plugin), ("plugin_ae", cfg.plugin_ae)):
        try:
            name = plugin_name(plugin)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        if name not in (None, "hybrid"):
            logger.info("%s=%s has no effect: sampling knows hybrid; each process makes samples of its own", key, name)
    if cfg.plugin != "hybrid":
        return
    if world_size == 1:
        logger.info("one process: the parallel plugin of the config is not used")
    check_sizes(cfg.plugin_config, model, world_size)
    if world_size > 1 and cfg.plugin_config.tp_size > 1 and kind_of_section(cfg.model) is not None:
        raise UserError(
            f"plugin_config.tp_size={cfg.plugin_config.tp_size}: quantised weights ({kind_of_section(cfg.model)}) are "
            "not divided; use sp_size or branch_size, or weights that are not quantised"
        )


def in_frames(cfg: InferenceOptions, spec: LatentSpec) -> InferenceOptions:
    """The config with its ``seconds`` as ``num_frames``, to the nearest length that an autoencoder makes.

    Raises:
        UserError: both are chosen.
    """
    if cfg.seconds is None:
        return cfg
    if "num_frames" in _chosen(cfg):
        raise UserError(f"seconds={cfg.seconds:g} and num_frames={cfg.sampling_option.num_frames}: give one of them")
    frames = spec.frames_of(cfg.seconds, cfg.fps_save)
    return replace(cfg, sampling_option=replace(cfg.sampling_option, num_frames=frames))


def check_goes_on(model: nn.Module, plan: SamplePlan) -> None:
    """Raise a UserError if a video is to be made in windows by a model that cannot continue from latents."""
    if plan.windows is not None and not _config(model).cond_embed:
        raise UserError(
            f"num_frames={plan.length} is longer than sampling_option.window={plan.num_frames}, and this model "
            "cannot continue from latents (model.cond_embed is False): use fewer frames, or --window none"
        )


def check_takes_references(model: nn.Module, cond_type: str) -> None:
    """Raise a UserError if a model has no input for references."""
    if not _config(model).cond_embed:
        raise UserError(f"cond_type {cond_type}: this model takes no references (model.cond_embed is False)")


def needed_sections(cfg: InferenceOptions) -> dict[str, ModelOptions]:
    """Sections of the models that a run needs, by name.

    Raises:
        UserError: one is not there.
    """
    found = {"model": cfg.model, "ae": cfg.ae, "t5": cfg.t5, "clip": cfg.clip}
    if cfg.use_t2i2v:
        found |= {"img_flux": cfg.img_flux, "img_flux_ae": cfg.img_flux_ae}
    for name, section in found.items():
        if section is None:
            raise UserError(f"{cfg.config_path}: the config has no section `{name}`")
    return {name: section for name, section in found.items() if section is not None}


def _config(model: nn.Module) -> DiffusionConfig:
    config: DiffusionConfig = as_diffusion_model(model).config
    return config


def _check_channels(cfg: InferenceOptions, model: nn.Module, ae: nn.Module) -> None:
    config = _config(model)
    patch, channels = cfg.patch_size, as_autoencoder(ae).latent_channels
    if config.cond_embed and config.patch_size != patch:
        raise UserError(f"patch_size={patch} and model.patch_size={config.patch_size} must be equal")
    if config.in_channels != channels * patch**2:
        raise UserError(
            f"model.in_channels={config.in_channels} does not fit the autoencoder: {channels} latent channels "
            f"x patch {patch} x {patch} = {channels * patch**2}"
        )
