"""A run of every command that comes to its end in seconds: what it is given, and where it writes."""

from typing import NamedTuple

from tests.attack.cases import commands


class Work(NamedTuple):
    """A run.

    Attributes:
        name: of the command.
        script: see :class:`tests.attack.server.Order`.
        words: its command line, with places as in :class:`tests.attack.runner.Case`; it writes below its folder.
        again: words more that let it replace what it made before.
        copies: good inputs that lie in its folder, since it writes beside them.
        tells: exit status that tells of a machine at fault, which is what it is asked.
    """

    name: str
    script: str
    words: tuple[str, ...]
    again: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    tells: int = 0


def _convert(name: str, *words: str, script: str = "") -> Work:
    return Work(f"convert {name}", f"tools/convert/{script or name}.py", words, ("--overwrite",))


INFER, ADAPTER, OVERWRITE = "{good}/infer.py", "{good}/lora", ("--overwrite", "True")
MMDIT, T5 = "{demo}/mmdit.safetensors", "{demo}/google/t5-demo"
VAE = "{demo}/vae.safetensors"
ONE_MORE = ("--resume", "auto", "--max-steps", "2")
QUICK = ("--quick", "--config", INFER)
WORKS = (
    Work("generate", commands.INFERENCE.script, (*commands.INFERENCE.words, "--save-latents", "True"), OVERWRITE),
    Work(
        "generate table",
        commands.INFERENCE.script,
        (*commands.FROM_TABLE.words, "--dataset.data-path", "{good}/prompts.csv"),
        OVERWRITE,
    ),
    Work(
        "decode",
        commands.DECODE.script,
        (INFER, "sample.latents.safetensors"),
        OVERWRITE,
        ("sample.latents.safetensors",),
    ),
    Work("train", commands.TRAIN.script, (*commands.TRAIN.words, "--exp-name", "e", "--num_workers", "1"), ONE_MORE),
    Work("cache", commands.CACHE.script, (*commands.CACHE.words, "--model.from_pretrained", "none"), OVERWRITE),
    Work(
        "train-vae",
        commands.VAE_TRAIN.script,
        (*commands.VAE_TRAIN.words, "--exp-name", "e", "--num_workers", "1"),
        ONE_MORE,
    ),
    Work("reconstruct", commands.VAE_INFERENCE.script, (*commands.VAE_INFERENCE.words, "--num_workers", "1")),
    Work("vae-stats", commands.VAE_STATS.script, (*commands.VAE_STATS.words, "--num_workers", "1")),
    Work(
        "trajectories",
        "scripts/diffusion/trajectories.py",
        (INFER, "--dataset.data-path", "{good}/clips.csv", "--save-dir", "out"),
        OVERWRITE,
    ),
    Work("serve", "tests/attack/served.py", (INFER, "--data-dir", "data")),
    Work(
        "meta",
        commands.META.script,
        ("--input", "{good}/clips.csv", "--output", "out.csv", "--num_workers", "1"),
        ("--overwrite",),
    ),
    Work("shard", "scripts/cnv/shard.py", ("clips.parquet", "2"), ("--overwrite",), copies=("clips.parquet",)),
    Work("data run", "tools/data/run.py", (*commands.DATA.words, "--workers", "1")),
    Work("data export", "tools/data/export.py", ("made",), ("--overwrite",), ("made",)),
    Work("data sheet", "tools/data/sheet.py", ("made",), ("--overwrite",), ("made",)),
    Work("data stats", "tools/data/stats.py", ("made",), ("--overwrite",), ("made",)),
    Work("data status", "tools/data/status.py", ("{good}/made",)),
    Work("data table", "tools/data/table.py", ("{good}/clips.csv", "--out", "out.parquet"), ("--overwrite",)),
    Work(
        "data stage",
        "tools/data/stage_run.py",
        ("blur", "{good}/data.py", "--input", "{good}/footage", "--output", "out"),
    ),
    Work("data footage", "tools/data/sample_footage.py", ("--out", "out")),
    _convert("mmdit", MMDIT, "out.safetensors", "--qkv", "fused"),
    _convert("checkpoint", "{good}/checkpoint", "out.safetensors"),
    _convert("quantize", MMDIT, "out.safetensors", "int8"),
    _convert("quantize t5", T5, "out", "int8", script="quantize"),
    _convert("to_diffusers", "{demo}/image_ae.safetensors", "out", "--norm-groups", "4"),
    _convert("widen_decoder", VAE, "out.safetensors", "--channels", "16", "32", "64", "96", "--norm-groups", "4"),
    _convert("to_diffusers pipeline", INFER, "out", "--pipeline", script="to_diffusers"),
    _convert("from_diffusers", "{good}/diffusers", "out.safetensors"),
    _convert("lora", "convert", ADAPTER, "out.safetensors", "--to", "kohya"),
    _convert("lora peft", "convert", ADAPTER, "out", "--to", "peft", script="lora"),
    _convert("lora merge", "merge", MMDIT, ADAPTER, "out.safetensors", "--from-rope", "half-split", script="lora"),
    Work("demo picture", "tools/demo/draw_picture.py", ("--out", "out.png"), ("--overwrite",)),
    Work("demo clips", "tools/demo/make_clips.py", ("--num", "2", "--seed", "0", "--out", "out", "--workers", "1")),
    Work("demo evaluate", "tools/demo/evaluate.py", (INFER, "--out", "out", "--num_seen", "2", "--i2v", "2")),
    Work(
        "demo evaluate long",
        "tools/demo/evaluate_long.py",
        (INFER, "--out", "out", "--num", "2", "--lengths", "17", "--window", "13", "--resolution", "64px"),
    ),
    Work(
        "demo evaluate frames",
        "tools/demo/evaluate_frames.py",
        (
            INFER,
            "--out",
            "out",
            "--pairs",
            "1",
            "--num",
            "1",
            "--cond_types",
            "frames",
            "region",
            "--resolution",
            "64px",
        ),
    ),
    Work(
        "demo evaluate vae",
        "tools/demo/evaluate_vae.py",
        (INFER, "--data", "{good}/demo/clips.csv", "--out", "out", "--num", "2"),
    ),
    Work(
        "demo text",
        "tools/demo/train_text.py",
        ("--out", "out", "--steps", "1", "--num-test", "2"),
        ("--overwrite",),
    ),
    Work("demo diversity", "tools/demo/diversity.py", (INFER, "--prompts", "1", "--seeds", "2")),
    Work("evaluate videos", "tools/evaluate/videos.py", ("{good}/footage", "--out", "out"), ("--overwrite",)),
    Work(
        "evaluate compare",
        "tools/evaluate/compare.py",
        ("{good}/footage", "{good}/footage", "--out", "out"),
        ("--overwrite",),
    ),
    Work(
        "benchmark decoding",
        "tools/benchmark/decoding.py",
        ("--size", "32x32", "--seconds", "1", "--frames", "5", "--repeats", "1"),
    ),
    Work(
        "benchmark data",
        "tools/benchmark/data.py",
        ("--part", "table", "--seconds", "1", "--repeats", "1", "--out", "out.json"),
        ("--overwrite",),
    ),
    Work(
        "evaluate compare configs",
        "tools/evaluate/compare.py",
        (INFER, f"{INFER} --num_steps 2", "--prompts", "{good}/prompts.csv", "--out", "out"),
        ("--overwrite",),
    ),
    Work(
        "vbench prepare",
        "tools/evaluate/vbench.py",
        ("prepare", "--work", "out", "--info", "{good}/vbench.json"),
    ),
    Work(
        "benchmark",
        "tools/benchmark/inference.py",
        ("--config", INFER, "--comparison", "0", "--full-steps", "2", "--out", "out.json"),
        ("--overwrite",),
    ),
    Work(
        "benchmark training",
        "tools/benchmark/training.py",
        ("{good}/train.py", "--steps", "1", "--warm-up", "1", "--out", "out.json"),
        ("--overwrite",),
    ),
    Work(
        "benchmark checkpoints",
        "tools/benchmark/checkpoints.py",
        ("--megabytes", "1", "--repeats", "1", "--folder", "."),
    ),
    Work(
        "benchmark models",
        "tools/benchmark/models.py",
        ("--vae", "--size", "32", "--frames", "9", "--repeats", "5", "--out", "out.json"),
        ("--overwrite",),
    ),
    Work(
        "benchmark gpu",
        "tools/benchmark/gpu.py",
        ("--device", "cpu", "--toy", "--quick", "--seconds", "5", "--out", "out.json"),
        ("--overwrite",),
    ),
    Work(
        "benchmark parallel",
        "tools/benchmark/parallel.py",
        ("--processes", "2", "--image", "16", "--text", "4"),
    ),
    Work("benchmark quantization", "tools/benchmark/quantization.py", (*QUICK, "--kinds", "int8")),
    Work("benchmark solvers", "tools/benchmark/solvers.py", (*QUICK, "--reference_steps", "4")),
    Work("benchmark step caches", "tools/benchmark/step_caches.py", (*QUICK, "--thresholds", "0.1")),
    Work("doctor", "opensora/cli/doctor.py", (), tells=1),
    Work("benchmark tables", "tools/benchmark/tables.py", ("--rows", "1000")),
)

# scripts without a work of their own, and why
WITHOUT = {
    "scripts/serve.py": "as served.py, which ends",
    "tools/benchmark/gpu_parts/original.py": "a part of gpu.py, which needs a checkout of another project",
    "tools/benchmark/hardware.py": "writes a page of this repository's documentation, and takes nothing",
    "tools/containers/try_steps.py": "installs packages for minutes",
    "tools/demo/check_judge.py": "judges or draws what this repository holds, half a minute long",
    "tools/demo/pictures.py": "makes pictures of this repository's documentation for minutes",
    "tools/demo/run.py": "takes nothing, and writes into this repository what generate writes",
    "tools/evaluate/goldens.py": "keeps this repository's goldens, for minutes",
    "tools/evaluate/vote.py": "answers until it is stopped",
}

# of a server at {drip}, which is the hub and the language model as well
I2V = ("--cond_type", "i2v_head", "--ref", "{drip}/a.png")
REPO, CLIP_REPO, FILE = "org/name", "org/clip", "org/name/weights.safetensors"
CAPTION = ("--stages", "ingest,scenes,cut,frames,caption", "--workers", "0")
DRIPPED = (
    Work("generate: a reference", commands.INFERENCE.script, (*commands.INFERENCE.words, *I2V)),
    Work("generate: refine", commands.INFERENCE.script, (*commands.INFERENCE.words, "--refine-prompt", "True")),
    Work(
        "generate: local refine",
        commands.INFERENCE.script,
        (*commands.INFERENCE.words, "--refine-prompt", "True", "--refine-model", REPO),
    ),
    Work("generate: a config", commands.INFERENCE.script, (REPO, "--prompt", "a")),
    *(
        Work(f"{name}: {key}", command.script, (*command.words, f"--{key}.from_pretrained={value}"))
        for name, command, key, value in (
            ("generate", commands.INFERENCE, "model", FILE),
            ("generate", commands.INFERENCE, "t5", REPO),
            ("decode", commands.DECODE, "ae", FILE),
            ("train", commands.TRAIN, "clip", CLIP_REPO),
            ("train", commands.TRAIN, "model", FILE),
            ("cache", commands.CACHE, "t5", REPO),
            ("train-vae", commands.VAE_TRAIN, "model", FILE),
            ("reconstruct", commands.VAE_INFERENCE, "model", FILE),
            ("vae-stats", commands.VAE_STATS, "model", FILE),
            ("serve", commands.Command("tests/attack/served.py", (INFER, "--data-dir", "data")), "t5", REPO),
        )
    ),
    Work("data caption", "tools/data/run.py", (*commands.DATA.words, *CAPTION)),
    Work("data local caption", "tools/data/run.py", (*commands.DATA.words, *CAPTION, "--caption.local", REPO)),
)
