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
from opensora.utils.sizes import parse_bytes

DType = Literal["bf16", "fp16", "fp32", "half", "bfloat16", "float16", "float32", "float64"]
PROMPTS = "prompts are read in this process, at once"
BUCKETS_SAY = "bucket_config holds the batch size of each bucket"
# resolution name -> number of frames -> (probability or pair of them, batch size)
Buckets = dict[str, dict[int, Any]] | None


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Keys of every script."""

    device: str | None = opt(None, "cpu or cuda; none takes cuda where there is one")
    dtype: DType = opt("bf16", "precision of the models")
    seed: int = opt(1024, "seed of everything random except a sample's noise", least=0, most=MAX_SEED)
    imports: list[str] | None = opt(None, "modules of your own to import first, for what they register")
    config_path: str = "config"  # where the values come from, for messages


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Keys of every script that reads clips in buckets."""

    dataset: DatasetOptions | None = component("dataset", "clips", "clips and texts")
    bucket_config: Buckets = opt(None, "{resolution: {frames: (probability, batch size)}}")
    batch_size: int | None = opt(None, "samples per step", "samples", least=1, no_effect=BUCKETS_SAY)
    num_workers: int = opt(4, "processes that read data", least=0, most=MANY_WORKERS)
    prefetch_factor: int | None = opt(None, "batches each of them reads ahead", "batches", least=1, most=MANY_WORKERS)
    num_bucket_build_workers: int = opt(
        1, "processes that sort clips into buckets", least=1, no_effect="one process sorts a million rows in seconds"
    )


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(RunOptions):
    """Make videos from prompts, pictures and clips."""

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
        1024, "seed of everything random except a sample's noise", least=0, most=MAX_SEED, none_is_default=True
    )
    prompt: str | None = opt(None, "text of the video", verbatim=True)
    next_prompts: list[str] | None = opt(
        None, "texts of the windows after the first of a long video; the last one stays"
    )
    seconds: float | None = opt(
        None,
        "length at fps_save, to the nearest that the autoencoder makes, instead of num_frames",
        "s",
        above=0,
        most=3600,
    )
    ref: str | None = opt(
        None,
        "picture or clip to start from, several separated by ;, for cond_type frames with their places: a.png@64",
        reads="references",
    )
    mask: str | None = opt(
        None, "for cond_type region: picture or clip that is white where the reference is kept", reads="file"
    )
    cond_type: str = opt("t2v", "what the references fix", choices=CONDITIONS)
    save_dir: str = opt("samples", "folder for the results")
    dataset: DatasetOptions | None = component(
        "dataset", "prompts", "table of prompts, instead of prompt", {"type": "text"}
    )
    start_index: int = opt(0, "first row of the table", least=0, most=MANY_ROWS)
    end_index: int | None = opt(None, "row after the last one", least=-MANY_ROWS, most=MANY_ROWS)
    num_samples: int | None = opt(
        None, "rows from start_index, if there is no end_index", "rows", least=1, most=MANY_ROWS
    )
    batch_size: int = opt(1, "prompts sampled at a time", "prompts", least=1, most=1024)
    num_workers: int = opt(4, "processes that read data", least=0, most=MANY_WORKERS, no_effect=PROMPTS)
    prefetch_factor: int | None = opt(
        None, "batches each of them reads ahead", "batches", least=1, most=MANY_WORKERS, no_effect=PROMPTS
    )
    sampling_option: SamplingOption = section(SamplingOption, "size, length and guidance", {}, fill=True)
    num_sample: int = opt(1, "videos per prompt", "videos", least=1, most=100_000)
    fps_save: int = opt(16, "frame rate of the file, also told to the model", "frames/s", above=0, most=1000)
    motion_score: str | None = opt(None, "amount of motion told to the model: a number, or dynamic")
    refine_prompt: bool = opt(False, "let a language model write the prompt out")
    refine_model: str | None = opt(None, "folder or hub id of a local language model for that", reads="file")
    refine_base_url: str | None = opt(None, "OpenAI-compatible endpoint for that")
    refine_api_model: str | None = opt(None, "name of the model at the endpoint")
    model: ModelOptions | None = component("model", "diffusion", "video diffusion model")
    ae: ModelOptions | None = component("model", "autoencoder", "video autoencoder")
    t5: ModelOptions | None = component("model", "text", "encoder of the text tokens")
    clip: ModelOptions | None = component("model", "text", "encoder of the pooled text vector")
    patch_size: int = opt(2, "latent pixels per token side", "latent px", least=1, most=MAX_PATCH)
    use_t2i2v: bool = opt(False, "make a picture from the prompt first, then a video from it")
    img_resolution: str = opt("768px", "pixel count of that picture, by name")
    img_flux: ModelOptions | None = component("model", "diffusion", "image diffusion model")
    img_flux_ae: ModelOptions | None = component("model", "image autoencoder", "image autoencoder")
    offload: bool | Literal["blocks", "disk"] = opt(
        False, "have models on the device only while they work: whole, by blocks, or blocks from the disk"
    )
    gpu_memory: str | None = opt(None, "memory of the GPU to stay within, such as 16GB; none takes what is free")
    compile: bool = opt(False, "compile the diffusion model's blocks: faster steps, after a slow first one")
    precompute: bool = opt(True, "compute modulation and the like once per sample for all steps (same numbers)")
    save_prefix: str = opt("", "start of every file name")
    prompt_as_path: bool = opt(False, "name files after their prompts (VBench)")
    skip_existing: bool = opt(False, "leave out what is already there")
    overwrite: bool = opt(False, "replace what is already there")
    save_latents: bool = opt(False, "keep latents beside the videos")
    wait: bool = opt(False, "wait while another process writes to the same place, instead of refusing")
    dry_run: bool = opt(False, "check everything and print the plan, without loading weights")
    plugin: str | None = opt(None, "parallelism of the diffusion model: hybrid, or none")
    plugin_config: PluginOptions = section(PluginOptions, "its settings", {}, open=True)
    plugin_ae: str | None = opt(None, "parallelism of the autoencoder: hybrid, or none")
    plugin_config_ae: PluginOptions = section(
        PluginOptions, "its settings", {}, open=True, no_effect="tiles are divided over all ranks that share a video"
    )
    grad_clip: float = opt(0.0, "gradient norm limit", least=0, no_effect="sampling computes no gradients")
    pretrained_lora_path: list[str] | str | None = opt(
        None, "LoRA adapters to load: folder or file, or PATH@strength", reads="adapters"
    )
    merge_lora: bool = opt(True, "add adapters to the weights; false keeps them beside (slower, exact in bf16)")
    lora_partial: bool = opt(False, "use what fits of an adapter that fits the model only in part")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.gpu_memory, "gpu_memory")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(InferenceOptions):
    """Serve a config: a page in the browser, and the videos API of OpenAI. Requests replace what the config says of a
    video; keys that choose prompts and file names are refused."""

    host: str = opt("127.0.0.1", "address to listen at; another than this machine's own wants an api_key")
    port: int = opt(8000, "port to listen at; 0 takes a free one", least=0, most=65_535)
    data_dir: str = opt("serving", "folder for jobs, uploads and results")
    api_key: str | None = opt(None, "key that clients must send", verbatim=True)
    api_key_file: str | None = opt(None, "file with that key; it is not in lists of processes then")
    model_name: str | None = opt(None, "what answers call the model; none takes the config's name")
    page: bool = opt(True, "serve the page, at /")
    examples: str | None = opt(None, "table of prompts that the page offers; none takes some of the repository's")
    worker_processes: int = opt(1, "processes that make each video together, see plugin", least=1, most=MANY_PROCESSES)
    lora_dir: str | None = opt(None, "folder of LoRA adapters that requests may name")
    allow_urls: bool = opt(False, "fetch references from public addresses, never from private ones")
    max_queue: int = opt(256, "jobs that wait at most", "jobs", least=1, most=10**6)
    max_upload: float = opt(32.0, "largest request", "MiB", above=0, most=2**20)
    max_work: float | None = opt(
        None, "pixels x frames x steps of a video; none is ten times the config's own", "pixels", least=1
    )
    max_prompt: int = opt(4000, "longest prompt", "letters", least=1, most=100_000)
    max_disk: float = opt(20.0, "room for uploads and results; nothing is taken beyond it", "GiB", above=0)
    keep_hours: float = opt(168.0, "results are deleted after this", "hours", above=0)


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions(InferenceOptions):
    """Sample trajectories of a teacher beforehand, for a student of few steps to train on (into save_dir)."""

    configs: ClassVar[str] = "diffusion/trajectories"

    condition_config: dict[str, float] | None = opt(
        None, "{condition type: weight}: references from the clips of column path; none goes by the table", least=0
    )
    keep_every: int = opt(1, "distance of the states to keep", "steps", least=1)
    shard_size: int = opt(64, "trajectories per file", "samples", least=1)


@dataclass(frozen=True, kw_only=True)
class LoopOptions(Options):
    """Keys of both training scripts."""

    outputs: str = opt("./outputs", "folder of the experiments")
    exp_name: str | None = opt(None, "name of the experiment's folder; none makes one of time and config name")
    wait: bool = opt(False, "wait while another process writes to the same place, instead of refusing")
    load: str | None = opt(None, "checkpoint or experiment folder to go on from, or latest (below outputs)")
    load_changed: bool = opt(False, "let --load latest and --resume go on with another table or config")
    resume: Literal["auto"] | None = opt(None, "auto: go on from the newest checkpoint of exp_name, or start it")
    start_epoch: int | None = opt(None, "epoch to go on at, instead of the checkpoint's", least=0)
    start_step: int | None = opt(None, "step to go on at, instead of the checkpoint's", "steps", least=0)
    epochs: int | None = opt(None, "passes over the data at most; none is 1000 without max_steps", least=1)
    max_steps: int | None = opt(None, "where to stop, if epochs do not end before", "optimizer steps", least=1)
    accumulation_steps: int = opt(1, "batches per optimizer step", "batches", least=1)
    optim: OptimOptions = section(OptimOptions, "optimizer", {}, open=True)
    lr: float | None = opt(None, "learning rate, also sets optim.lr", least=0, also="optim.lr")
    initial_lr: float | None = opt(None, "learning rate at the start of warm-up", least=0)
    update_warmup_steps: bool = opt(
        False, "build the schedule anew when going on", no_effect="it always follows from the config and the step"
    )
    grad_clip: float = opt(0.0, "gradient norm limit (0 is none)", least=0)
    ema_decay: float | None = opt(None, "decay of the averaged weights; none keeps no average", least=0, below=1)
    plugin: str | None = opt(
        "zero2", "parallelism: zero1, zero2, hybrid, torch_ddp (ColossalAI), ddp, fsdp2 (torch), none"
    )
    plugin_config: PluginOptions = section(PluginOptions, "its settings", {}, open=True)
    pin_memory_cache_pre_alloc_numels: list[int] | None = opt(
        None,
        "pinned buffers to allocate",
        "elements",
        least=0,
        no_effect="torch keeps and reuses pinned buffers itself",
    )
    log_every: int = opt(1, "distance of log lines", "optimizer steps", least=1)
    ckpt_every: int = opt(0, "distance of checkpoints (0: only at the end)", "optimizer steps", least=0)
    keep_n_latest: int = opt(-1, "checkpoints to keep (-1: all)", least=-1)
    ckpt_shard_size_gb: float = opt(4.0, "weights above this size are saved in several files of it", "GiB", above=0)
    trackers: list[str] = opt(["tensorboard"], "where curves, samples and the config go", choices=TRACKERS)
    wandb: bool = opt(False, "log to Weights & Biases, too")
    wandb_project: str = opt("Open-Sora", "its project, and that of other trackers")
    max_skipped_steps: int = opt(
        20, "steps in a row without a finite loss and gradient that end the run", "steps", least=1
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions, LoaderOptions, RunOptions):
    """Train the diffusion model."""

    configs: ClassVar[str] = "diffusion/train"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "diffusion", "diffusion model")
    ae: ModelOptions | None = component("model", "autoencoder", "autoencoder, if latents are not cached")
    t5: ModelOptions | None = component("model", "text", "encoder of the text tokens, if not cached")
    clip: ModelOptions | None = component("model", "text", "encoder of the pooled text vector, if not cached")
    compile: bool = opt(False, "compile the model's blocks: faster steps, after a slow first one")
    training_method: str = opt("flow_matching", "what is minimised", choices=METHODS)
    training_method_config: dict[str, Any] | None = opt(None, "settings of the training method")
    cached_video: bool = opt(False, "clips come as latents, from cache_dir")
    cached_text: bool = opt(False, "texts come as embeddings, from cache_dir")
    cache_dir: str | None = opt(None, "folder that scripts/diffusion/cache.py writes")
    is_causal_vae: bool = opt(False, "first frame has a latent of its own", no_effect=AE_KNOWS)
    patch_size: int = opt(2, "latent pixels per token side", "latent px", least=1, most=MAX_PATCH)
    condition_config: dict[str, float] | None = opt(None, "{condition type: weight}; none trains on text only", least=0)
    dropout_ratio: DropoutOptions | None = section(DropoutOptions, "share of samples that train without their text")
    guidance: float = opt(4.0, "guidance scale told to models with guidance_embed", least=0)
    sigma_min: float = opt(1e-5, "noise that remains at the end of the path", least=0, below=1)
    time_sampling: TimeSamplingOptions = section(TimeSamplingOptions, "diffusion times that are drawn", {})
    loss_weighting: LossWeightingOptions = section(LossWeightingOptions, "weights of samples in the loss", {})
    no_i2v_ref_loss: bool = opt(False, "leave given first and last frames out of the loss")
    grad_checkpoint: bool = opt(True, "recompute blocks in backward")
    grad_ckpt_buffer_size: int = opt(
        0, "host memory for inputs of recomputed blocks (0: on the device)", "bytes", least=0
    )
    lora_config: dict[str, Any] | None = opt(None, "PEFT LoraConfig; none trains all weights")
    lora_dtype: Literal["fp32", "bf16"] = opt(
        "fp32", "precision in which adapters compute; bf16 is faster, and fp32 copies are kept"
    )
    weights_memory: str | None = opt(
        None,
        "device memory for frozen weights under adapters, such as 6GB: blocks beyond it come and go",
    )
    lora_checkpoint: str | None = opt(None, "adapter to start from: folder or file", reads="file")
    freeze_layers: list[str] | str | None = opt(None, "what not to train, by name: txt_in, double_blocks.*.txt_mlp")
    validation: ValidationOptions | None = section(
        ValidationOptions, "loss on held-out rows; none does without", fill=True
    )
    samples: TrainSampleOptions | None = section(
        TrainSampleOptions, "videos of fixed prompts on the way; none makes none", fill=True
    )
    warmup_steps: int | None = opt(None, "linear warm-up", "optimizer steps", least=0)
    use_cosine_scheduler: bool = opt(False, "cosine decay to zero after warm-up and plateau")
    flat_share: float = opt(0.0, "share of the run on the plateau before the decay (not of wsd)", least=0, below=1)
    lr_schedule: str | None = opt(
        None, "decay after warm-up and plateau; none goes by use_cosine_scheduler", choices=SCHEDULES
    )
    lr_decay_share: float = opt(0.2, "share of the run, at its end, in which wsd decays", above=0, most=1)
    lr_final_share: float = opt(0.0, "share of the learning rate that the decay ends at", least=0, most=1)
    keep_encoded: bool = opt(
        False, "keep latents and text embeddings in host memory, read each clip once (small datasets)"
    )
    keep_encoded_memory: str = opt(
        "8GB", "host memory of each process for them; what comes when it is filled is encoded every time"
    )
    encode_memory: str | None = opt(
        None,
        "memory for encoding clips, such as 12GB: as many of a batch at once as fit in, one at least; none is 8GB of a "
        "GPU, and 8 clips on a CPU",
    )
    warmup_ae: bool = opt(False, "run the autoencoder on every bucket shape first")
    async_io: bool = opt(False, "write checkpoints while training goes on")
    load_master_weights: bool = opt(False, "go on from the fp32 weights of a checkpoint")
    save_master_weights: bool = opt(False, "write the fp32 weights into checkpoints")
    record_time: bool = opt(False, "log seconds per stage")
    record_barrier: bool = opt(False, "ranks wait for each other before each stage's time is taken")
    nsys: bool = opt(False, "let Nsight Systems record some steps")
    nsys_warmup_steps: int = opt(2, "steps before the record", "steps", least=0)
    nsys_num_steps: int = opt(2, "steps in the record", "steps", least=1)
    dry_run: bool = opt(False, "check the config and print memory, arithmetic and time, without loading anything")
    dry_run_ranks: int | None = opt(
        None, "processes that dry_run plans for; none is those that torchrun started", least=1, most=MANY_PROCESSES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("weights_memory", "keep_encoded_memory", "encode_memory"):
            parse_bytes(getattr(self, key), key)


@dataclass(frozen=True, kw_only=True)
class CacheOptions(TrainOptions):
    """Compute latents and text embeddings of a training config beforehand."""

    batch_size: int | None = opt(
        None, "clips of one size encoded at a time; none goes by encode_memory", "clips", least=1
    )
    cache_parts: Literal["both", "video", "text"] = opt("both", "what to compute")
    cache_part: str | None = opt(
        None, "write every so many-th file, such as 3/16 (counted from 0), beside writers of the others; none is all"
    )
    cache_shard_size: int = opt(64, "clips, or texts, per file", "samples", least=1)
    overwrite: bool = opt(False, "replace a cache that was made with something else")


@dataclass(frozen=True, kw_only=True)
class VaeTrainOptions(LoopOptions, LoaderOptions, RunOptions):
    """Train a video autoencoder."""

    configs: ClassVar[str] = "vae/train"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "autoencoder", "autoencoder")
    grad_checkpoint: bool = opt(False, "recompute blocks in backward")
    vae_loss_config: VaeLossOptions | None = section(VaeLossOptions, "reconstruction loss")
    discriminator: ModelOptions | None = component("model", "discriminator", "discriminator; none trains without")
    gen_loss_config: GeneratorLossOptions | None = section(GeneratorLossOptions, "adversarial loss of the autoencoder")
    disc_loss_config: DiscriminatorLossOptions | None = section(DiscriminatorLossOptions, "loss of the discriminator")
    optim_discriminator: OptimOptions | None = section(OptimOptions, "optimizer of the discriminator", open=True)
    disc_lr: float | None = opt(None, "also sets optim_discriminator.lr", least=0, also="optim_discriminator.lr")
    lr_scheduler: SchedulerOptions | None = section(SchedulerOptions, "learning-rate schedule")
    disc_lr_scheduler: SchedulerOptions | None = section(
        SchedulerOptions, "learning-rate schedule of the discriminator"
    )
    mixed_strategy: Literal["mixed_video_image", "mixed_video_random"] | None = opt(None, "how lengths are mixed")
    mixed_image_ratio: float = opt(0.0, "share of single frames in mixed_video_image", least=0, most=1)
    image_steps: int = opt(0, "training on single frames before video", "optimizer steps", least=0)
    image_bucket_config: Buckets = opt(None, "buckets of that training")
    image_lr: float | None = opt(None, "learning rate of that training; none takes optim.lr", least=0)
    restart_disc: bool = opt(False, "start the discriminator anew when going on")
    load_optimizer: bool = opt(True, "go on with the optimizer's state")
    latent_noise: float = opt(
        0.0, "noise on latents before they are decoded, drawn up to this", "standard deviations", least=0, most=10
    )
    freeze_layers: str | None = opt(None, "parts not to train, separated by commas: encoder, decoder, ..., or all")
    profile: bool = opt(False, "record a torch profile of some steps")
    wandb_expr_name: str | None = opt(None, "name of the run at Weights & Biases; none takes exp_name")


@dataclass(frozen=True, kw_only=True)
class VaeInferenceOptions(LoaderOptions, RunOptions):
    """Encode and decode clips, and save both."""

    configs: ClassVar[str] = "vae/inference"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "autoencoder", "autoencoder")
    dtype: DType = opt("fp32", "precision of the model")
    save_dir: str = opt("samples", "folder for the results")
    wait: bool = opt(False, "wait while another process writes to the same place, instead of refusing")
    eval_setting: str | None = opt(None, "frames x side (17x256) or frames x height x width, instead of bucket_config")
    fps: int = opt(16, "frame rate of the clips", "frames/s", least=1, most=1000)
    frame_interval: int = opt(
        1, "distance of sampled frames; files play at fps // frame_interval", "frames", least=1, most=MANY_FRAMES
    )
    lpips: LpipsOptions | None = section(LpipsOptions, "weights of LPIPS; none leaves this measure out")
    max_clips: int | None = opt(None, "clips to reconstruct; none takes all", "clips", least=1)
    sheet_clips: int = opt(8, "clips on the picture of originals and reconstructions", "clips", least=0)
    verbose: int = opt(1, "amount of log output (0, 1, 2)", least=0)


@dataclass(frozen=True, kw_only=True)
class VaeStatsOptions(LoaderOptions, RunOptions):
    """Mean and standard deviation of latents."""

    configs: ClassVar[str] = "vae/inference"
    aliases: ClassVar[dict[str, str]] = {"ckpt_path": "model.from_pretrained"}

    model: ModelOptions | None = component("model", "autoencoder", "autoencoder")
    dtype: DType = opt("fp32", "precision of the model")
    eval_setting: str | None = opt(None, "frames x side (17x256) or frames x height x width, instead of bucket_config")
    max_batches: int | None = opt(None, "batches to look at; none takes the whole dataset", "batches", least=1)
    verbose: int = opt(1, "amount of log output (0, 1, 2)", least=0)
