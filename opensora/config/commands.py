"""Every key that a config file or a command line may set: type, default, unit and one line of help.

Here are the top-level keys, one group per script (``InferenceOptions`` ...) with the script's aliases; the sections
below them are in ``opensora.config.options`` and may be imported from here too. To add a key, add its line.
"""

# ruff: noqa: RUF009 - opt(), section() and component() make dataclass fields

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opensora.config.choices import CONDITIONS, METHODS, SCHEDULES, TRACKERS
from opensora.config.options import (
    AE_KNOWS,
    MANY_FRAMES,
    MANY_PROCESSES,
    MANY_ROWS,
    MANY_WORKERS,
    MAX_PATCH,
    MAX_SEED,
    DatasetOptions,
    DiscriminatorLossOptions,
    DropoutOptions,
    GeneratorLossOptions,
    LossWeightingOptions,
    LpipsOptions,
    ModelOptions,
    OptimOptions,
    Options,
    PluginOptions,
    SamplingOption,
    SchedulerOptions,
    TimeSamplingOptions,
    TrainSampleOptions,
    VaeLossOptions,
    ValidationOptions,
    component,
    opt,
    section,
)
from opensora.config.topics import Topic
from opensora.utils.sizes import parse_bytes

DType = Literal["bf16", "fp16", "fp32", "half", "bfloat16", "float16", "float32", "float64"]
PROMPTS = "prompts are read in this process, at once"
BUCKETS_SAY = "bucket_config holds the batch size of each bucket"
# resolution name -> number of frames -> (probability or pair of them, batch size)
Buckets = dict[str, dict[int, Any]] | None


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Keys of every script."""

    device: str | None = opt(None, "cpu or cuda; default: cuda if available", topic=Topic.GENERAL)
    dtype: DType = opt("bf16", "precision of the models")
    seed: int = opt(1024, "random seed of everything except the sampling noise", least=0, most=MAX_SEED)
    imports: list[str] | None = opt(None, "your own modules to import first, for the classes they register")
    config_path: str = "config"  # where the values come from, for messages


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Keys of every script that reads clips in buckets."""

    dataset: DatasetOptions | None = component("dataset", "clips", "training clips and captions", topic=Topic.DATA)
    bucket_config: Buckets = opt(None, "{resolution: {frames: (probability, batch size)}}")
    batch_size: int | None = opt(None, "samples per step", "samples", least=1, no_effect=BUCKETS_SAY)
    num_workers: int = opt(4, "data loading processes", least=0, most=MANY_WORKERS)
    prefetch_factor: int | None = opt(
        None, "batches that each data loading process prefetches", "batches", least=1, most=MANY_WORKERS
    )
    num_bucket_build_workers: int = opt(
        1, "processes that sort clips into buckets", least=1, no_effect="one process sorts a million rows in seconds"
    )


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(RunOptions):
    """Generate videos from prompts, images and clips."""

    configs: ClassVar[str] = "diffusion/inference"
    aliases: ClassVar[dict[str, str]] = {
        **{
            key: f"sampling_option.{key}"
            for key in (
                *("resolution", "aspect_ratio", "num_frames", "window", "overlap"),
                *("num_steps", "guidance", "guidance_img", "flow_shift"),
            )
        },
        "ckpt_path": "model.from_pretrained",
        "step_cache": "sampling_option.step_cache_threshold",
        "offload_model": "offload",
        "prompt_refine": "refine_prompt",
    }

    seed: int = opt(
        1024, "random seed of everything except the sampling noise", least=0, most=MAX_SEED, none_is_default=True
    )
    prompt: str | None = opt(None, "text prompt", verbatim=True, topic=Topic.PROMPTS)
    next_prompts: list[str] | None = opt(
        None, "prompts of the further windows of a long video; the last one applies to the rest"
    )
    seconds: float | None = opt(
        None,
        "length at fps_save, rounded to one that the autoencoder supports; replaces num_frames",
        "s",
        above=0,
        most=3600,
        topic=Topic.SAMPLING,
    )
    ref: str | None = opt(
        None,
        "reference image or clip; separate several with ;, with places for cond_type frames: a.png@64",
        reads="references",
        topic=Topic.PROMPTS,
    )
    mask: str | None = opt(
        None, "for cond_type region: image or clip that is white where the reference is kept", reads="file"
    )
    cond_type: str = opt("t2v", "which frames the references condition", choices=CONDITIONS)
    save_dir: str = opt("samples", "output folder", topic=Topic.OUTPUT)
    dataset: DatasetOptions | None = component(
        "dataset", "prompts", "table of prompts, in place of prompt", {"type": "text"}, topic=Topic.PROMPTS
    )
    start_index: int = opt(0, "start of the row range", least=0, most=MANY_ROWS)
    end_index: int | None = opt(None, "end of the row range (exclusive)", least=-MANY_ROWS, most=MANY_ROWS)
    num_samples: int | None = opt(
        None, "number of rows from start_index, unless end_index is set", "rows", least=1, most=MANY_ROWS
    )
    batch_size: int = opt(1, "prompts per batch", "prompts", least=1, most=1024)
    num_workers: int = opt(4, "data loading processes", least=0, most=MANY_WORKERS, no_effect=PROMPTS)
    prefetch_factor: int | None = opt(
        None,
        "batches that each data loading process prefetches",
        "batches",
        least=1,
        most=MANY_WORKERS,
        no_effect=PROMPTS,
    )
    sampling_option: SamplingOption = section(
        SamplingOption, "size, length and guidance", {}, fill=True, topic=Topic.SAMPLING
    )
    num_sample: int = opt(1, "videos per prompt", "videos", least=1, most=100_000)
    fps_save: int = opt(16, "frame rate; also appended to the prompt", "frames/s", above=0, most=1000)
    motion_score: str | None = opt(
        None,
        "motion score appended to the prompt: 1 (still) to 15, or dynamic (a language model decides)",
        topic=Topic.PROMPTS,
    )
    refine_prompt: bool = opt(False, "expand the prompt with a language model")
    refine_model: str | None = opt(None, "local language model for refine_prompt: folder or hub id", reads="file")
    refine_base_url: str | None = opt(None, "OpenAI-compatible endpoint for refine_prompt")
    refine_api_model: str | None = opt(None, "model name at refine_base_url")
    model: ModelOptions | None = component("model", "diffusion", "video diffusion model", topic=Topic.MODELS)
    ae: ModelOptions | None = component("model", "autoencoder", "video autoencoder")
    t5: ModelOptions | None = component("model", "text", "T5 text encoder (token embeddings)")
    clip: ModelOptions | None = component("model", "text", "CLIP text encoder (pooled embedding)")
    patch_size: int = opt(2, "patch size of the latents", "latent px", least=1, most=MAX_PATCH)
    use_t2i2v: bool = opt(
        False, "generate an image from the prompt first, then a video that starts from it", topic=Topic.T2I2V
    )
    img_resolution: str = opt("768px", "resolution of that image, by name")
    img_flux: ModelOptions | None = component("model", "diffusion", "image diffusion model")
    img_flux_ae: ModelOptions | None = component("model", "image autoencoder", "image autoencoder")
    offload: bool | Literal["blocks", "disk"] = opt(
        False,
        "keep models on the device only while in use: whole, by blocks, or blocks read from disk",
        topic=Topic.SPEED,
    )
    gpu_memory: str | None = opt(None, "GPU memory limit, such as 16GB; default: what is free")
    compile: bool = opt(False, "torch.compile the diffusion model's blocks; the first step is slow")
    precompute: bool = opt(True, "precompute modulation once per sample for all steps (same results)")
    save_prefix: str = opt("", "prefix of every file name", topic=Topic.OUTPUT)
    prompt_as_path: bool = opt(False, "name files after their prompts (VBench)")
    skip_existing: bool = opt(False, "skip videos that already exist")
    overwrite: bool = opt(False, "overwrite existing files")
    save_latents: bool = opt(False, "save latents next to the videos")
    wait: bool = opt(False, "if another process writes to the same place, wait instead of failing")
    dry_run: bool = opt(False, "check everything and print the plan, without loading weights", topic=Topic.GENERAL)
    plugin: str | None = opt(None, "parallelism of the diffusion model: hybrid, or none", topic=Topic.DEVICES)
    plugin_config: PluginOptions = section(PluginOptions, "settings of the plugin", {}, open=True)
    plugin_ae: str | None = opt(None, "parallelism of the autoencoder: hybrid, or none")
    plugin_config_ae: PluginOptions = section(
        PluginOptions,
        "settings of plugin_ae",
        {},
        open=True,
        no_effect="tiles are divided over all ranks that share a video",
    )
    grad_clip: float = opt(
        0.0, "gradient clipping: maximum norm", least=0, no_effect="sampling computes no gradients", topic=Topic.GENERAL
    )
    pretrained_lora_path: list[str] | str | None = opt(
        None, "LoRA adapters to load: folder or file, or PATH@strength", reads="adapters", topic=Topic.LORA
    )
    merge_lora: bool = opt(
        True, "merge adapters into the weights; false applies them separately (slower, exact in bf16)"
    )
    lora_partial: bool = opt(False, "apply the matching part of an adapter that fits the model only partly")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.gpu_memory, "gpu_memory")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(InferenceOptions):
    """Serve a config: a web page and OpenAI's videos API. Requests override the config's settings of a video; keys
    that choose prompts and file names are refused."""

    host: str = opt("127.0.0.1", "address to listen on; anything but localhost requires an api_key", topic=Topic.SERVER)
    port: int = opt(8000, "port to listen on; 0 picks a free one", least=0, most=65_535)
    data_dir: str = opt("serving", "folder for jobs, uploads and results")
    api_key: str | None = opt(None, "API key that clients must send", verbatim=True)
    api_key_file: str | None = opt(None, "file that holds the API key, which keeps it out of process lists")
    model_name: str | None = opt(None, "model name in responses; default: the config's name")
    page: bool = opt(True, "serve the page, at /")
    examples: str | None = opt(None, "table of example prompts on the page; default: some from the repository")
    worker_processes: int = opt(
        1, "processes that generate each video together, see plugin", least=1, most=MANY_PROCESSES, topic=Topic.DEVICES
    )
    lora_dir: str | None = opt(None, "folder of LoRA adapters that requests may name", topic=Topic.SERVER)
    allow_urls: bool = opt(False, "fetch references from public addresses, never from private ones", topic=Topic.LIMITS)
    max_queue: int = opt(256, "maximum number of queued jobs", "jobs", least=1, most=10**6)
    max_upload: float = opt(32.0, "maximum request size", "MiB", above=0, most=2**20)
    max_work: float | None = opt(
        None, "maximum pixels x frames x steps of a video; default: ten times the config's", "pixels", least=1
    )
    max_prompt: int = opt(4000, "maximum prompt length", "letters", least=1, most=100_000)
    max_disk: float = opt(20.0, "disk space for uploads and results; requests beyond it are refused", "GiB", above=0)
    keep_hours: float = opt(168.0, "results are deleted after this long", "hours", above=0)


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions(InferenceOptions):
    """Sample a teacher's trajectories into save_dir, for few-step distillation."""

    configs: ClassVar[str] = "diffusion/trajectories"

    condition_config: dict[str, float] | None = opt(
        None,
        "{condition type: weight}: references from the clips of column path; none: as the table says",
        least=0,
        topic=Topic.PROMPTS,
    )
    keep_every: int = opt(1, "keep every N-th state", "steps", least=1, topic=Topic.OUTPUT)
    shard_size: int = opt(64, "trajectories per file", "samples", least=1)


@dataclass(frozen=True, kw_only=True)
class LoopOptions(Options):
    """Keys of both training scripts."""

    outputs: str = opt("./outputs", "root folder of the experiments", topic=Topic.RESUME)
    exp_name: str | None = opt(None, "experiment name (its folder); default: time and config name")
    wait: bool = opt(False, "if another process writes to the same place, wait instead of failing")
    load: str | None = opt(None, "checkpoint or experiment folder to resume from, or latest (newest below outputs)")
    load_changed: bool = opt(False, "let --load latest and --resume continue with a different table or config")
    resume: Literal["auto"] | None = opt(None, "auto: resume from the newest checkpoint of exp_name, or start it")
    start_epoch: int | None = opt(None, "epoch to resume at, instead of the checkpoint's", least=0)
    start_step: int | None = opt(None, "step to resume at, instead of the checkpoint's", "steps", least=0)
    epochs: int | None = opt(
        None, "maximum passes over the data; default without max_steps: 1000", least=1, topic=Topic.OPTIMIZER
    )
    max_steps: int | None = opt(None, "maximum number of steps, unless epochs end before", "optimizer steps", least=1)
    accumulation_steps: int = opt(1, "gradient accumulation: batches per optimizer step", "batches", least=1)
    optim: OptimOptions = section(OptimOptions, "optimizer", {}, open=True)
    lr: float | None = opt(None, "learning rate", least=0, also="optim.lr")
    initial_lr: float | None = opt(None, "learning rate at the start of warm-up", least=0)
    update_warmup_steps: bool = opt(
        False, "rebuild the schedule on resume", no_effect="it always follows from the config and the step"
    )
    grad_clip: float = opt(0.0, "gradient clipping: maximum norm (0: off)", least=0)
    ema_decay: float | None = opt(None, "EMA decay of the weights; none: no EMA", least=0, below=1)
    plugin: str | None = opt(
        "zero2",
        "parallelism: zero1, zero2, hybrid, torch_ddp (ColossalAI), ddp, fsdp2 (torch), none",
        topic=Topic.DEVICES,
    )
    plugin_config: PluginOptions = section(PluginOptions, "settings of the plugin", {}, open=True)
    pin_memory_cache_pre_alloc_numels: list[int] | None = opt(
        None,
        "pinned buffers to allocate",
        "elements",
        least=0,
        no_effect="torch keeps and reuses pinned buffers itself",
        topic=Topic.SPEED,
    )
    log_every: int = opt(1, "log interval", "optimizer steps", least=1, topic=Topic.REPORTS)
    ckpt_every: int = opt(0, "checkpoint interval (0: only at the end)", "optimizer steps", least=0, topic=Topic.RESUME)
    keep_n_latest: int = opt(-1, "number of checkpoints to keep (-1: all)", least=-1)
    ckpt_shard_size_gb: float = opt(4.0, "shard size: larger weights are saved in several files", "GiB", above=0)
    trackers: list[str] = opt(
        ["tensorboard"],
        "experiment trackers, for curves, samples and the config",
        choices=TRACKERS,
        topic=Topic.REPORTS,
    )
    wandb: bool = opt(False, "also log to Weights & Biases")
    wandb_project: str = opt("Open-Sora", "project name at Weights & Biases and other trackers")
    max_skipped_steps: int = opt(
        20,
        "consecutive steps with a non-finite loss or gradient after which the run stops",
        "steps",
        least=1,
        topic=Topic.OPTIMIZER,
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions, LoaderOptions, RunOptions):
    """Train the diffusion model."""

    configs: ClassVar[str] = "diffusion/train"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "diffusion", "diffusion model", topic=Topic.MODELS)
    ae: ModelOptions | None = component("model", "autoencoder", "autoencoder, if latents are not cached")
    t5: ModelOptions | None = component("model", "text", "T5 text encoder (token embeddings), if not cached")
    clip: ModelOptions | None = component("model", "text", "CLIP text encoder (pooled embedding), if not cached")
    compile: bool = opt(False, "torch.compile the model's blocks; the first step is slow", topic=Topic.SPEED)
    training_method: str = opt("flow_matching", "training objective", choices=METHODS, topic=Topic.OBJECTIVE)
    training_method_config: dict[str, Any] | None = opt(None, "settings of the training method")
    cached_video: bool = opt(False, "read latents from cache_dir instead of clips", topic=Topic.DATA)
    cached_text: bool = opt(False, "read text embeddings from cache_dir instead of captions")
    cache_dir: str | None = opt(None, "cache folder, written by opensora cache")
    is_causal_vae: bool = opt(False, "first frame has a latent of its own", no_effect=AE_KNOWS, topic=Topic.MODELS)
    patch_size: int = opt(2, "patch size of the latents", "latent px", least=1, most=MAX_PATCH)
    condition_config: dict[str, float] | None = opt(
        None, "{condition type: weight}; none: text only", least=0, topic=Topic.OBJECTIVE
    )
    window: int | None = opt(
        None,
        "cut the latents of longer clips to windows that continue from their own first ones",
        "frames",
        least=1,
        most=MANY_FRAMES,
    )
    dropout_ratio: DropoutOptions | None = section(DropoutOptions, "text dropout, for classifier-free guidance")
    guidance: float = opt(4.0, "guidance scale given to models with guidance_embed", least=0)
    sigma_min: float = opt(1e-5, "noise level that remains at the end of the path", least=0, below=1)
    time_sampling: TimeSamplingOptions = section(TimeSamplingOptions, "distribution of the diffusion times", {})
    loss_weighting: LossWeightingOptions = section(LossWeightingOptions, "loss weighting of samples", {})
    no_i2v_ref_loss: bool = opt(False, "exclude given first and last frames from the loss")
    grad_checkpoint: bool = opt(
        True, "gradient checkpointing: recompute blocks in the backward pass", topic=Topic.SPEED
    )
    grad_ckpt_buffer_size: int = opt(0, "host memory for checkpointed activations (0: on the device)", "bytes", least=0)
    lora_config: dict[str, Any] | None = opt(
        None, "arguments of PEFT's LoraConfig; none: train all weights", topic=Topic.LORA
    )
    lora_dtype: Literal["fp32", "bf16"] = opt(
        "fp32", "compute precision of the adapters; bf16 is faster, with fp32 master copies"
    )
    weights_memory: str | None = opt(
        None,
        "device memory for frozen weights, such as 6GB; the other blocks are streamed from the host",
        topic=Topic.SPEED,
    )
    lora_checkpoint: str | None = opt(None, "adapter to start from: folder or file", reads="file", topic=Topic.LORA)
    freeze_layers: list[str] | str | None = opt(
        None, "layers to freeze, by name: txt_in, double_blocks.*.txt_mlp", topic=Topic.OBJECTIVE
    )
    validation: ValidationOptions | None = section(
        ValidationOptions, "validation loss on held-out rows; none: off", fill=True, topic=Topic.REPORTS
    )
    samples: TrainSampleOptions | None = section(
        TrainSampleOptions, "sample videos of fixed prompts during training; none: off", fill=True
    )
    warmup_steps: int | None = opt(None, "linear warm-up", "optimizer steps", least=0, topic=Topic.OPTIMIZER)
    use_cosine_scheduler: bool = opt(False, "cosine decay to zero after warm-up and plateau")
    flat_share: float = opt(
        0.0, "share of the run at a constant learning rate before the decay (not of wsd)", least=0, below=1
    )
    lr_schedule: str | None = opt(
        None, "learning-rate schedule after warm-up; default: as use_cosine_scheduler says", choices=SCHEDULES
    )
    lr_decay_share: float = opt(0.2, "final share of the run in which wsd decays", above=0, most=1)
    lr_final_share: float = opt(0.0, "final learning rate, as a share of the peak", least=0, most=1)
    keep_encoded: bool = opt(
        False,
        "keep latents and text embeddings in host memory, so each clip is read once (small datasets)",
        topic=Topic.DATA,
    )
    keep_encoded_memory: str = opt(
        "8GB", "host memory limit of keep_encoded, per process; further clips are encoded every time"
    )
    encode_memory: str | None = opt(
        None, "memory for encoding clips, such as 12GB; default: 8GB of a GPU, 8 clips on a CPU", topic=Topic.SPEED
    )
    warmup_ae: bool = opt(False, "run the autoencoder on every bucket shape first")
    async_io: bool = opt(False, "write checkpoints in the background", topic=Topic.RESUME)
    load_master_weights: bool = opt(False, "resume from the fp32 master weights of a checkpoint")
    save_master_weights: bool = opt(False, "save the fp32 master weights in checkpoints")
    record_time: bool = opt(False, "log seconds per stage", topic=Topic.PROFILING)
    record_barrier: bool = opt(False, "synchronise ranks before each stage is timed")
    nsys: bool = opt(False, "profile some steps with Nsight Systems")
    nsys_warmup_steps: int = opt(2, "steps before profiling", "steps", least=0)
    nsys_num_steps: int = opt(2, "steps to profile", "steps", least=1)
    dry_run: bool = opt(
        False, "check the config and print memory, compute and time, without loading anything", topic=Topic.GENERAL
    )
    dry_run_ranks: int | None = opt(
        None, "processes that dry_run plans for; default: those that torchrun started", least=1, most=MANY_PROCESSES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("weights_memory", "keep_encoded_memory", "encode_memory"):
            parse_bytes(getattr(self, key), key)


@dataclass(frozen=True, kw_only=True)
class CacheOptions(TrainOptions):
    """Precompute latents and text embeddings for a training config."""

    batch_size: int | None = opt(None, "clips per encoding batch; default: as encode_memory allows", "clips", least=1)
    cache_parts: Literal["both", "video", "text"] = opt("both", "what to compute", topic=Topic.OUTPUT)
    cache_part: str | None = opt(
        None, "write one part of the files, such as 3/16 (counted from 0), for several writers; default: all"
    )
    cache_shard_size: int = opt(64, "clips, or texts, per file", "samples", least=1)
    overwrite: bool = opt(False, "overwrite a cache that was made with other settings")


@dataclass(frozen=True, kw_only=True)
class VaeTrainOptions(LoopOptions, LoaderOptions, RunOptions):
    """Train a video autoencoder."""

    configs: ClassVar[str] = "vae/train"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "autoencoder", "autoencoder", topic=Topic.MODELS)
    grad_checkpoint: bool = opt(
        False, "gradient checkpointing: recompute blocks in the backward pass", topic=Topic.SPEED
    )
    vae_loss_config: VaeLossOptions | None = section(VaeLossOptions, "reconstruction loss", topic=Topic.OBJECTIVE)
    discriminator: ModelOptions | None = component("model", "discriminator", "discriminator; none: off")
    gen_loss_config: GeneratorLossOptions | None = section(GeneratorLossOptions, "adversarial loss of the autoencoder")
    disc_loss_config: DiscriminatorLossOptions | None = section(DiscriminatorLossOptions, "loss of the discriminator")
    optim_discriminator: OptimOptions | None = section(
        OptimOptions, "optimizer of the discriminator", open=True, topic=Topic.OPTIMIZER
    )
    disc_lr: float | None = opt(None, "learning rate of the discriminator", least=0, also="optim_discriminator.lr")
    lr_scheduler: SchedulerOptions | None = section(SchedulerOptions, "learning-rate schedule")
    disc_lr_scheduler: SchedulerOptions | None = section(
        SchedulerOptions, "learning-rate schedule of the discriminator"
    )
    mixed_strategy: Literal["mixed_video_image", "mixed_video_random"] | None = opt(
        None, "how images and lengths are mixed", topic=Topic.DATA
    )
    mixed_image_ratio: float = opt(0.0, "share of single frames in mixed_video_image", least=0, most=1)
    image_steps: int = opt(0, "steps on single frames before video", "optimizer steps", least=0)
    image_bucket_config: Buckets = opt(None, "buckets during image_steps")
    image_lr: float | None = opt(
        None, "learning rate during image_steps; default: optim.lr", least=0, topic=Topic.OPTIMIZER
    )
    restart_disc: bool = opt(False, "reinitialise the discriminator on resume", topic=Topic.RESUME)
    load_optimizer: bool = opt(True, "restore the optimizer state on resume")
    latent_noise: float = opt(
        0.0,
        "noise on latents before they are decoded, drawn up to this",
        "standard deviations",
        least=0,
        most=10,
        topic=Topic.OBJECTIVE,
    )
    freeze_layers: str | None = opt(None, "parts to freeze, separated by commas: encoder, decoder, ..., or all")
    profile: bool = opt(False, "profile some steps with torch.profiler", topic=Topic.PROFILING)
    wandb_expr_name: str | None = opt(None, "run name at Weights & Biases; default: exp_name", topic=Topic.REPORTS)


@dataclass(frozen=True, kw_only=True)
class VaeInferenceOptions(LoaderOptions, RunOptions):
    """Reconstruct clips with an autoencoder, and measure how well."""

    configs: ClassVar[str] = "vae/inference"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "autoencoder", "autoencoder", topic=Topic.MODELS)
    dtype: DType = opt("fp32", "precision of the model")
    save_dir: str = opt("samples", "output folder", topic=Topic.OUTPUT)
    wait: bool = opt(False, "if another process writes to the same place, wait instead of failing")
    eval_setting: str | None = opt(
        None, "frames x side (17x256) or frames x height x width, instead of bucket_config", topic=Topic.DATA
    )
    fps: int = opt(16, "frame rate of the clips", "frames/s", least=1, most=1000)
    frame_interval: int = opt(
        1, "stride of sampled frames; files play at fps // frame_interval", "frames", least=1, most=MANY_FRAMES
    )
    lpips: LpipsOptions | None = section(LpipsOptions, "LPIPS weights; none: no LPIPS", topic=Topic.MODELS)
    max_clips: int | None = opt(None, "maximum number of clips; default: all", "clips", least=1, topic=Topic.DATA)
    sheet_clips: int = opt(
        8, "clips on the contact sheet of originals and reconstructions", "clips", least=0, topic=Topic.OUTPUT
    )
    verbose: int = opt(1, "amount of log output (0, 1, 2)", least=0, topic=Topic.GENERAL)


@dataclass(frozen=True, kw_only=True)
class VaeStatsOptions(LoaderOptions, RunOptions):
    """Compute the mean and standard deviation of latents."""

    configs: ClassVar[str] = "vae/inference"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "autoencoder", "autoencoder", topic=Topic.MODELS)
    dtype: DType = opt("fp32", "precision of the model")
    eval_setting: str | None = opt(
        None, "frames x side (17x256) or frames x height x width, instead of bucket_config", topic=Topic.DATA
    )
    max_batches: int | None = opt(None, "maximum number of batches; default: the whole dataset", "batches", least=1)
    verbose: int = opt(1, "amount of log output (0, 1, 2)", least=0, topic=Topic.GENERAL)
