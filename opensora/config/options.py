"""Option groups: every key with its type, default, bounds, unit and one line of help, written down once.

A group is a frozen dataclass, a key is one line: ``name: type = opt(default, help, unit, least=...)``. What is read
from a config file and a command line is an instance of the script's group (``opensora.config.commands``), whose
sections are instances of theirs.
"""

# ruff: noqa: RUF009 - opt(), section() and component() make dataclass fields

import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_type_hints

from opensora.config.choices import CONDITIONS, LOSS_WEIGHTINGS, SCHEDULES, SOLVERS, TIME_SAMPLINGS, Choices
from opensora.utils.errors import UserError

BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = MappingProxyType(
    {
        "least": (operator.ge, "at least"),
        "above": (operator.gt, "above"),
        "most": (operator.le, "at most"),
        "below": (operator.lt, "below"),
    }
)
AE_KNOWS = "the autoencoder knows it"
MAX_SEED = 2**63 - 1
# more than these is a slip of the finger
MANY_WORKERS, MANY_PROCESSES, MANY_ROWS = 512, 65_536, 2**31
MANY_PIXELS, MANY_FRAMES, MANY_STEPS = 32_768, 100_000, 10_000
MAX_WIDTH, MAX_DEPTH, MAX_PATCH = 2**20, 4096, 64  # of models, likewise


def opt(default: Any, help: str, unit: str = "", **extra: Any) -> Any:
    """A key of a group.

    Args:
        default: value when nobody sets the key; lists and dicts are copied per instance.
        help: one line for ``--help``.
        unit: unit of the value, empty if it has none.
        extra: bounds of a number, or of each number of a list or dict: ``least`` and ``most`` (may be reached),
            ``above`` and ``below`` (may not); numbers are always finite. ``required=True``: every config has to give
            the key. ``choices=TABLE``: a text, or each of a list, that is one of the names in a table of
            ``opensora.config.choices``.
            ``verbatim=True`` keeps a command line's ``none`` as text; ``none_is_default=True`` takes ``none`` for the
            default, and says so; ``also="optim.lr"`` sets that key too;
            ``reads="file"`` marks a text (or a list of them) that is the path of something to read, which a config may
            give relative to its own folder (``"references"``, ``"adapters"``: several in one text);
            ``no_effect=REASON`` marks a key that configs of Open-Sora 2.0 hold and that nothing needs any more;
            ``topic=Topic.DATA`` is the heading of ``--help`` for this key and those after it.
    """
    metadata = {"help": help, "unit": unit, "default": default, **extra}
    if "group" in extra and default is not None:
        return field(default_factory=extra["group"], metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(group: type, help: str, default: dict | None = None, **extra: Any) -> Any:
    """A section whose keys are those of ``group``; ``default={}`` is the group's defaults, None no section.

    ``open=True`` lets files hold further keys; ``fill=True`` writes the group's defaults into the resolved config.
    """
    return opt(default, help, group=group, **extra)


def component(registry: str, role: str, help: str, default: dict | None = None, **extra: Any) -> Any:
    """A section with ``type``, a name of a registry; its keys are those of that type's option group.

    Args:
        registry: ``"model"`` or ``"dataset"``, see ``opensora.config.registries``.
        role: which of the shipped types may stand here; a user's own may always.
        help: one line for ``--help``.
        default: content if there is none.
        extra: as for :func:`opt`.
    """
    metadata = {"help": help, "unit": "", "default": default, "registry": registry, "role": role, **extra}
    return field(default=None, metadata=metadata)


def _numbers(value: Any) -> Collection[Any]:
    """What a value holds: itself, or the items of a list, tuple or dict."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def check_bounds(value: Any, metadata: Mapping[str, Any], name: str) -> None:
    """Refuse a number outside the bounds of its key, NaN and infinity; of a list, tuple or dict, each of its numbers.
    Refuse a text that is not among the choices of its key.

    Raises:
        UserError: names the key and what it may be.
    """
    choices: Choices | None = metadata.get("choices")
    if choices is not None:
        for chosen in _numbers(value):
            if chosen is not None and chosen not in choices:
                raise UserError(f"{name} {chosen}: expected one of {choices.listing}")
    for number in _numbers(value):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if not math.isfinite(number):
            raise UserError(f"{name}={value}: must be a finite number")
        bounds = [(*BOUNDS[bound], metadata[bound]) for bound in BOUNDS if bound in metadata]
        if not all(holds(number, limit) for holds, _, limit in bounds):
            expected = " and ".join(f"{words} {limit}" for _, words, limit in bounds)
            raise UserError(f"{name}={value}: must be {expected}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all option groups.

    Attributes:
        given: keys that a file or command line set, in their order (empty where code made the instance).
        chosen: of a script's own group: the dotted keys that a command line or a call set beside the file.
        extra: keys of an open section, and variables of a file, that the group does not define.

    Raises:
        UserError: a number outside the bounds of its key.
    """

    aliases: ClassVar[dict[str, str]] = {}
    configs: ClassVar[str] = ""  # folder below ``configs`` whose files a script takes by name
    key_prefix: ClassVar[str] = ""  # where a config has these keys, with a dot, for messages

    given: tuple[str, ...] = field(default=(), repr=False, compare=False)
    chosen: tuple[str, ...] = field(default=(), repr=False, compare=False)
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            if key.metadata:
                check_bounds(getattr(self, key.name), key.metadata, f"{self.key_prefix}{key.name}")

    @property
    def is_complete(self) -> bool:
        """Whether all keys are given that every config has to give."""
        return all(key.name in self.given for key in dataclasses.fields(self) if key.metadata.get("required"))

    def to_dict(self) -> dict[str, Any]:
        """What was given, in its order, and what differs from the defaults; sections as dicts, too."""
        values = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        defaults = {key.name: default_of(key) for key in dataclasses.fields(self) if key.metadata or key.name == "type"}
        changed = [name for name, default in defaults.items() if values[name] != default]
        content = {**values, **self.extra}
        names = dict.fromkeys([*(name for name in self.given if name in content), *changed, *self.extra])
        return {name: _plain(content[name]) for name in names}


@dataclass(frozen=True, kw_only=True)
class Component(Options):
    """A section that a registered ``type`` fills."""

    type: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Component):
    """A model; its weights are read from where ``from_pretrained`` says."""

    main_key: ClassVar[str] = "from_pretrained"

    from_pretrained: str | None = opt(None, "weight file, folder or hub path", reads="file")
    cache_dir: str | None = opt(None, "folder of hub downloads")


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(Component):
    """A table."""

    main_key: ClassVar[str] = "data_path"

    data_path: str | None = opt(None, "CSV or parquet table", reads="file")


def check_group(group: Any, base: type[Options], owner: str) -> None:
    """Refuse what is no option group, when it is registered.

    Args:
        group: of the user's own.
        base: group that it must derive from.
        owner: what it belongs to, for messages.

    Raises:
        UserError: says what is wrong with it.
    """
    if not (isinstance(group, type) and issubclass(group, base)):
        raise UserError(f"{owner}: the option group {group!r} must be a class derived from {base.__name__}")
    if "__dataclass_fields__" not in vars(group) and vars(group).get("__annotations__"):
        raise UserError(f"{owner}: write @dataclass(frozen=True, kw_only=True) above the option group {group.__name__}")
    known = {key.name for key in dataclasses.fields(base)}
    bare = [key.name for key in dataclasses.fields(group) if not key.metadata and key.name not in known]
    if bare:
        raise UserError(f"{owner}: {group.__name__}.{bare[0]}: write it as `{bare[0]}: TYPE = opt(DEFAULT, HELP)`")
    try:
        get_type_hints(group)
    except NameError as error:
        raise UserError(f"{owner}: a type in {group.__name__} cannot be read: {error}") from None


def default_of(key: dataclasses.Field) -> Any:
    """Value of a field that nobody sets."""
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Options) else value


# ---------------------------------------------------------------------------------------------------- plain sections


@dataclass(frozen=True, kw_only=True)
class SamplingOption(Options):
    """What one sample looks like and how it is drawn."""

    width: int | None = opt(
        None, "width, if no resolution is given; rounded up to a multiple of 16", "px", least=1, most=MANY_PIXELS
    )
    height: int | None = opt(
        None, "height, if no resolution is given; rounded up to a multiple of 16", "px", least=1, most=MANY_PIXELS
    )
    resolution: str | None = opt(None, "pixel count by name: 256px, 512px, 768px, 1024px, ...")
    aspect_ratio: str | None = opt(None, "width:height: 16:9, 9:16, 1:1, 2.39:1, ...")
    num_frames: int = opt(1, "number of frames; 1 generates an image", "frames", least=1, most=MANY_FRAMES)
    window: int | None = opt(
        None,
        "window length; longer videos are generated in overlapping windows",
        "frames",
        least=1,
        most=MANY_FRAMES,
    )
    overlap: int | None = opt(
        None,
        "overlap of consecutive windows; default: 33, or 1 in short windows",
        "frames",
        least=1,
        most=MANY_FRAMES,
    )
    num_steps: int = opt(50, "sampling steps", "steps", least=1, most=MANY_STEPS)
    solver: str = opt("euler", "ODE solver", choices=SOLVERS)
    step_cache: str | None = opt(None, "step cache that reuses transformer outputs between steps, by name; none: off")
    step_cache_threshold: float | None = opt(
        None,
        "threshold of the step cache (approximate); 0: off; without step_cache, of first_block",
        least=0,
        most=10,
    )
    guidance: float = opt(4.0, "classifier-free guidance scale for the text (1: off)", least=-1000, most=1000)
    text_osci: bool = opt(False, "text guidance on every other step only, after the first ten")
    guidance_img: float | None = opt(
        None, "classifier-free guidance scale for the image (1: off)", least=-1000, most=1000
    )
    image_osci: bool = opt(False, "image guidance on every other step only, after the first ten")
    scale_temporal_osci: bool = opt(False, "image guidance grows along the frames, less so on later steps")
    keep_given: bool = opt(
        False, "reset given frames at every step, for models not trained on the condition (approximate)"
    )
    seed: int | None = opt(
        None, "seed of the sampling noise; default: derived from --seed and the row", most=MAX_SEED
    )  # least: check_seed
    shift: bool = opt(True, "shift the time schedule towards noise for large samples")
    method: Literal["i2v", "distill"] = opt(
        "i2v", "guidance by several forward passes (i2v), or as a model input (distill)"
    )
    temporal_reduction: int = opt(
        1, "frames per latent frame of the autoencoder", "frames", least=1, no_effect=AE_KNOWS
    )
    is_causal_vae: bool = opt(False, "first frame has a latent of its own (lengths 4k+1)")
    flow_shift: float | None = opt(None, "shift of the time schedule; default: computed from the size", above=0)


@dataclass(frozen=True, kw_only=True)
class OptimOptions(Options):
    """Optimizer."""

    cls: str = opt("HybridAdam", "optimizer: HybridAdam, AdamW, Adam, AdamW8bit, Muon")
    lr: float = opt(1e-5, "learning rate", least=0)
    eps: float = opt(1e-8, "epsilon added to the denominator", least=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", least=0)
    betas: tuple[float, float] = opt((0.9, 0.999), "decay of the moments", least=0, below=1)
    adamw_mode: bool | None = opt(None, "decoupled weight decay (AdamW) rather than L2; default: by cls")
    momentum: float | None = opt(None, "momentum of Muon (0.95)", least=0, below=1)
    groups: dict[str, dict[str, Any]] | None = opt(
        None, "{pattern of parameter names: {lr, weight_decay}}: parameter groups with their own settings"
    )
    states: Literal["device", "host"] = opt(
        "device", "where optimizer states and fp32 master weights are kept; host saves device memory"
    )
    in_backward: bool = opt(
        False, "gradient release: update each weight during the backward pass and free its gradient"
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions(Options):
    """Learning-rate schedule."""

    warmup_steps: int | None = opt(None, "linear warm-up", "optimizer steps", least=0)
    name: str | None = opt(None, "schedule after warm-up; default: as cosine says", choices=SCHEDULES)
    cosine: bool = opt(False, "cosine decay to zero after warm-up and plateau")
    flat_share: float = opt(
        0.0, "share of the run at a constant learning rate before the decay (not of wsd)", least=0, below=1
    )
    decay_share: float = opt(0.2, "final share of the run in which wsd decays", above=0, most=1)
    final_share: float = opt(0.0, "final learning rate, as a share of the peak", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class PluginOptions(Options):
    """Parallelism; further keys of a file go to the ColossalAI plugin as they are."""

    tp_size: int = opt(1, "tensor-parallel group", "ranks", least=1, most=MANY_PROCESSES)
    pp_size: int = opt(1, "pipeline-parallel group", "ranks", least=1, most=MANY_PROCESSES)
    sp_size: int = opt(1, "sequence-parallel group", "ranks", least=1, most=MANY_PROCESSES)
    branch_size: int = opt(
        1, "ranks that share the guidance branches of a sampling step", "ranks", least=1, most=MANY_PROCESSES
    )
    shard_size: int | None = opt(
        None,
        "ranks that fsdp2 shards weights over, averaging between such groups (HSDP); none: all",
        "ranks",
        least=2,
        most=MANY_PROCESSES,
    )
    whole_gradients: bool = opt(
        False, "fsdp2: keep accumulated gradients unsharded, reduce them once a step (4 bytes a weight)"
    )
    sequence_parallelism_mode: str | None = opt(
        None, "how tokens are exchanged: all_to_all, ring_attn; none or auto: the first where the heads allow it"
    )
    enable_sequence_parallelism: bool = opt(
        False, "split tokens over the sequence-parallel group", no_effect="sp_size above 1 does it"
    )
    static_graph: bool = opt(False, "every step runs the same graph")
    zero_stage: int = opt(2, "ZeRO stage of the hybrid plugin", least=0, most=2)
    overlap_allgather: bool = opt(True, "gather parameters while computing")
    reduce_bucket_size_in_m: int = opt(20, "gradient bucket", "million elements", least=1)
    initial_scale: float = opt(
        2.0**16,
        "first loss scale in fp16",
        above=0,
        no_effect="training works in bf16 or fp32, which need no loss scale",
    )
    cast_inputs: bool = opt(False, "cast inputs to the training precision")


@dataclass(frozen=True, kw_only=True)
class DropoutOptions(Options):
    """Text dropout, for classifier-free guidance."""

    t5: float = opt(0.0, "probability of an empty T5 text", least=0, most=1)
    clip: float = opt(0.0, "probability of an empty CLIP text", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class TimeSamplingOptions(Options):
    """Diffusion times that training draws; 1 is noise."""

    name: str = opt("logit_normal", "density of the times before the shift", choices=TIME_SAMPLINGS)
    mean: float = opt(0.0, "of logit_normal: mean of the logit; above 0 shifts towards noise", least=-10, most=10)
    width: float = opt(1.0, "of logit_normal: standard deviation of the logit", above=0, most=10)
    mode_scale: float = opt(
        1.29, "of mode: above 0 middle times are drawn more often, below 0 the ends", least=-1, most=1.75
    )
    shift: bool = opt(True, "shift the times towards noise for large samples, as in sampling")
    flow_shift: float | None = opt(None, "shift of the times; default: computed from the size", above=0)


@dataclass(frozen=True, kw_only=True)
class LossWeightingOptions(Options):
    """Weights of samples in the loss; they are multiplied and not normalised."""

    time: str | None = opt(None, "weight over the diffusion time, by name; none: uniform", choices=LOSS_WEIGHTINGS)
    gamma: float = opt(5.0, "of min_snr: signal-to-noise ratio that weights are cut at", above=0, most=1000)
    conditions: dict[str, float] | None = opt(None, "{condition type: weight}; those not named weigh 1", least=0)


@dataclass(frozen=True, kw_only=True)
class LpipsOptions(Options):
    """Weights of the perceptual distance LPIPS."""

    heads: str | None = opt(None, "file or hub path of its linear heads (lin0.model.1.weight ...)", reads="file")
    backbone: str | None = opt(None, "file or hub path of VGG16 (features.0.weight ...)", reads="file")
    random: bool = opt(False, "random weights instead, to try a config")
    cache_dir: str | None = opt(None, "folder of hub downloads")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(Options):
    """Loss on held-out rows, at fixed times and noise, so that it only changes with the model."""

    data_path: str | None = opt(None, "csv or parquet table of rows that training does not see", reads="file")
    every: int = opt(500, "validation interval", "optimizer steps", least=1)
    max_rows: int = opt(64, "rows to take, from the start of the table", "rows", least=1)
    timesteps: list[float] = opt(
        [0.1, 0.3, 0.5, 0.7, 0.9], "diffusion times of every row, in (0, 1); 1 is noise", above=0, below=1
    )
    bins: int | None = opt(
        None, "equal bins of the diffusion time, with one time per row in each; replaces timesteps", least=1, most=100
    )
    seed: int = opt(0, "seed of the validation noise and conditions", least=0, most=MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class TrainSampleOptions(Options):
    """Sample videos of fixed prompts during training, in the experiment's folder `samples` and beside the curves."""

    prompts: list[str] = opt([], "prompts, one video each")
    refs: list[str] | None = opt(
        None, "reference images or clips, one per prompt, unless cond_type is t2v", reads="references"
    )
    cond_type: str = opt("t2v", "which frames the references condition", choices=CONDITIONS)
    every: int = opt(1000, "sampling interval", "optimizer steps", least=1)
    seed: int = opt(42, "seed of the starting noise", least=0, most=MAX_SEED)
    fps: int = opt(24, "frame rate; also appended to the prompt", "frames/s", above=0, most=1000)
    use_ema: bool = opt(True, "use the EMA weights if there are any")
    sampling_option: SamplingOption = section(SamplingOption, "size, length and guidance", {}, fill=True)


@dataclass(frozen=True, kw_only=True)
class VaeLossOptions(Options):
    """Reconstruction loss."""

    perceptual_loss_weight: float = opt(0.0, "weight of LPIPS", least=0)
    lpips: LpipsOptions | None = section(LpipsOptions, "weights of LPIPS")
    kl_loss_weight: float = opt(1e-6, "weight of the KL divergence", least=0)
    mse_loss_weight: float = opt(0.0, "weight of the squared beside the absolute error", least=0)
    object_weight: float = opt(0.0, "extra weight of pixels that differ from the clip's background", least=0)
    logvar_init: float = opt(0.0, "log variance of the reconstruction", least=-30, most=20)


@dataclass(frozen=True, kw_only=True)
class GeneratorLossOptions(Options):
    """Adversarial loss of the autoencoder."""

    gen_start: int = opt(0, "step at which this loss starts", "optimizer steps", least=0)
    disc_factor: float = opt(1.0, "constant factor", least=0)
    disc_weight: float = opt(0.5, "weight on top of the adaptive one", least=0)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorLossOptions(Options):
    """Loss of the discriminator."""

    disc_start: int = opt(0, "step at which this loss starts", "optimizer steps", least=0)
    disc_factor: float = opt(1.0, "constant factor", least=0)
    disc_loss_type: Literal["hinge", "vanilla", "wgan-gp"] = opt("hinge", "form of the loss")
