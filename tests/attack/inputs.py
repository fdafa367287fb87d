"""Good inputs of every command, made once; cases change one thing about them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from opensora.utils.video import save_image, save_video
from tests.attack.runner import Server
from tests.attack.server import ROOT, Order

DEMO = ROOT / "assets" / "demo"
SAMPLE = "sample.latents.safetensors"
T5, CLIP = DEMO / "google" / "t5-demo", DEMO / "openai" / "clip-demo"
ENCODERS = f"""
ae = dict(from_pretrained="{DEMO}/vae.safetensors")
t5 = dict(from_pretrained="{T5}")
clip = dict(from_pretrained="{CLIP}")
"""
SMALL = "hidden_size=32, num_heads=2, axes_dim=[4, 6, 6], depth=1, depth_single_blocks=1"
CONFIGS = {
    "infer.py": f"""
_base_ = ["{ROOT}/configs/diffusion/inference/demo.py"]
sampling_option = dict(num_frames=5, num_steps=1)
model = dict(from_pretrained="{DEMO}/mmdit.safetensors")
{ENCODERS}
""",
    "train.py": f"""
_base_ = ["{ROOT}/configs/diffusion/train/demo_cpu.py"]
dataset = dict(data_path="{{good}}/clips.csv")
bucket_config = {{{{"_delete_": True, "64px_ar1:1": {{{{5: (1.0, 2)}}}}}}}}
model = dict({SMALL})
keep_encoded = False
max_steps = 1
{ENCODERS}
""",
    "vae_train.py": f"""
_base_ = ["{ROOT}/configs/vae/train/demo_disc.py"]
dataset = dict(data_path="{{good}}/clips.csv", keep_in_memory=False)
bucket_config = {{{{"_delete_": True, "64px_ar1:1": {{{{5: (1.0, 2)}}}}}}}}
model = dict(from_pretrained="{DEMO}/vae.safetensors")
max_steps = 1
""",
    "vae.py": f"""
_base_ = ["{ROOT}/configs/vae/inference/demo.py"]
dataset = dict(data_path="{{good}}/clips.csv")
bucket_config = {{{{"_delete_": True, "64px_ar1:1": {{{{5: (1.0, 2)}}}}}}}}
model = dict(from_pretrained="{DEMO}/vae.safetensors")
""",
    "data.py": """
stages = ["ingest", "scenes", "cut", "blur", "filter"]
workers = 0
ingest = dict(min_seconds=0.1, min_bpp=0.0, min_fps=1)
cut = dict(min_seconds=0.1, preset="ultrafast")
filter = dict(tiers=dict(base=dict(sharpness=[0, None])))
""",
}


def write_inputs(good: Path) -> None:
    """Clips, pictures, tables, configs, latents and an adapter."""
    for name, text in CONFIGS.items():
        filled = text.replace("{good}", str(good)).replace("{{", "{").replace("}}", "}")
        (good / name).write_text(filled)
    random, rows = np.random.default_rng(0), []
    (good / "footage").mkdir()
    for number in range(4):
        frames = random.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
        path = save_video(frames, good / "footage" / f"{number}.mp4", 8)
        rows.append(dict(path=str(path), text=f"clip {number}", num_frames=9, height=64, width=64, fps=8.0))
    clips = pd.DataFrame(rows)
    clips.to_csv(good / "clips.csv", index=False)
    clips.to_parquet(good / "clips.parquet", index=False)
    save_image(frames[0], good / "picture.png")
    save_video(random.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8), good / "long.mp4", 8)
    prompts = pd.DataFrame([{"text": "a", "seed": 1, "name": "n"}, {"text": "b", "seed": 2, "name": "m"}])
    prompts.to_csv(good / "prompts.csv", index=False)
    prompts.to_parquet(good / "prompts.parquet", index=False)
    facts = {"fps": "8", "first_frame": "0", "end_frame": "5"}
    save_file({"latents": torch.zeros(8, 2, 8, 8)}, good / SAMPLE, metadata=facts)
    write_adapter(good / "lora")
    torch.save(load_file(DEMO / "mmdit.safetensors"), good / "weights.pt")
    few = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    torch.save(few, good / "old.pt", _use_new_zipfile_serialization=False)


def copy_writable(source: Path, target: Path) -> Path:
    """Copy a file or folder; what is copied may be written to."""
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    return target


def write_adapter(folder: Path, target: str = "img_attn_qkv", width: int = 160) -> None:
    """A LoRA of rank 2 of a module that the demo model has in its first double block, or of another."""
    folder.mkdir()
    name = f"base_model.model.double_blocks.0.img_attn.{target.rpartition('_')[2]}"
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(2, width), f"{name}.lora_B.weight": torch.zeros(3 * width, 2)},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def run_commands(good: Path, server: Server) -> None:
    """What commands make that others take: a checkpoint, a cache, shards, an output folder of tools/data."""
    diffusion, small = "scripts/diffusion", ("--model.from_pretrained", "none")
    for script, *words in (
        (f"{diffusion}/train.py", "train.py", "--outputs", "outputs", "--exp-name", "e"),
        (f"{diffusion}/cache.py", "train.py", "--cache-dir", "cache", *small),
        ("scripts/cnv/shard.py", "clips.parquet", "2"),
        ("tools/data/run.py", "data.py", "--input", "footage", "--output", "made"),
        ("tools/demo/make_clips.py", "--num", "2", "--seed", "0", "--out", "demo", "--workers", "1"),
    ):
        temporary = good / "tmp"
        temporary.mkdir()
        outcome = server.run(Order(script, words, str(good), str(temporary), 600.0, stop_at_weights=False))
        said = good.with_name(f"{good.name}.err").read_text()
        assert outcome.status == 0, f"{script}: {outcome}\n{said}"
        temporary.rmdir()
    (checkpoint,) = (good / "outputs" / "e").glob("epoch*")
    shutil.copytree(checkpoint, good / "checkpoint")
