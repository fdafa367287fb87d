"""Ways to train, on a handful of real clips: adapters, frozen parts, bf16, mixed sizes, held-out rows, samples."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

from opensora.acceleration.compile import compile_blocks
from opensora.acceleration.streaming import BlockStream
from opensora.config import load_config, parse_config
from opensora.config.commands import CacheOptions, TrainOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.registry import MODELS, build_module
from opensora.training.checkpoint.folder import list_checkpoints, load_states
from opensora.training.diffusion.cache import cache_writer
from opensora.training.diffusion.trainer import Trainer
from opensora.training.loop import TrainLoop
from opensora.utils.errors import UserError
from opensora.utils.video import read_video, save_image, save_video
from opensora.utils.weights_writing import save_safetensors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(tmp_path, diffusion_content, write_config):
    """Train the tiny config with some keys replaced; returns the experiment folder."""

    def run(name: str, *words: str, **changes):
        torch.manual_seed(0)  # the autoencoder has random weights: the same ones in every run
        config = write_config(tmp_path / f"{name}.py", {**diffusion_content, **changes})
        given = [] if "--load" in words else ["--exp-name", name]
        return Trainer(parse_config([config, *given, *map(str, words)], TrainOptions)).run()

    return run


@pytest.fixture
def base(tmp_path, diffusion_content):
    """Weights of the tiny model as a file, and the model section that starts from it."""
    torch.manual_seed(5)
    section = diffusion_content["model"]
    model = build_module(dict(section), MODELS)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    file = tmp_path / "base.safetensors"
    save_safetensors(model.state_dict(), file)
    return {**section, "from_pretrained": str(file)}


def newest(folder):
    return list_checkpoints(folder)[-1]


def first_half(whole):
    """A folder with the first checkpoint of a run, as if it had been stopped there."""
    part = whole.with_name(f"{whole.name}_part")
    first = list_checkpoints(whole)[0]
    shutil.copytree(first, part / first.name)
    return part


def weights(folder, name="model/model.safetensors"):
    return load_file(newest(folder) / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def curves(folder):
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(folder, name):
    return {event.step: event.value for event in curves(folder).Scalars(name)}


STILL = dict(optim=dict(cls="AdamW", lr=0.0), warmup_steps=0)  # nothing changes
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_mlp", "linear2"])


def test_adapter_trains_resumes_and_generates(train, base, tiny_config, diffusion_content):
    options = dict(model=base, lora_config=LORA, max_steps=4, ckpt_every=2, ema_decay=0.9)
    whole = train("whole", **options)
    folder = newest(whole)
    assert sorted(p.name for p in folder.iterdir()) == ["lora", "lora_ema", "optimizer", "running_states.json"]
    assert json.loads((folder / "lora" / "adapter_config.json").read_text())["r"] == 2
    names = weights(whole, "lora/adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert any(value.abs().max() > 0 for name, value in names.items() if ".lora_B." in name)

    part = first_half(whole)
    train("again", "--load", str(part), **options)
    for name in ("lora/adapter_model.safetensors", "lora_ema/adapter_model.safetensors"):
        assert same(weights(whole, name), weights(part, name))
    start = train("start", **{**options, "max_steps": 1}, **STILL,
                  lora_checkpoint=str(folder / "lora"))  # fmt: skip
    assert same(names, weights(start, "lora/adapter_model.safetensors"))

    def sample(**changes):
        pipe = VideoPipeline.from_config({**tiny_config, "model": base}, **changes)
        return pipe("a", seed=1, num_steps=1, num_frames=1).latents

    adapted = sample(pretrained_lora_path=str(folder / "lora"))
    assert not torch.allclose(adapted, sample())
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        train("full", "--load", str(whole), model=base, max_steps=9)


@pytest.mark.parametrize(("kind", "more"), [
    ("int8", dict(dtype="bf16", lora_dtype="bf16", save_master_weights=True, load_master_weights=True)),
    ("nf4", dict(lora_config={**LORA, "use_dora": True}, grad_checkpoint=True)),
])  # fmt: skip
def test_adapter_on_quantised_weights_resumes_and_generates(train, base, tiny_config, kind, more):
    model = {**base, "quantize": kind}
    options = dict(model=model, lora_config=LORA, max_steps=4, ckpt_every=2, ema_decay=0.9) | more
    whole = train("whole", **options)
    part = first_half(whole)
    train("again", "--load", str(part), **options)
    assert "master.safetensors" not in {path.name for path in newest(whole).iterdir()}
    for name in ("lora/adapter_model.safetensors", "lora_ema/adapter_model.safetensors"):
        found = weights(whole, name)
        assert same(found, weights(part, name))
        assert {value.dtype for value in found.values()} == {torch.float32}
    assert any("magnitude" in name for name in found) == (kind == "nf4")

    def sample(**changes):
        pipe = VideoPipeline.from_config({**tiny_config, "model": model}, **changes)
        return pipe("a", seed=1, num_steps=1, num_frames=1).latents

    assert not torch.allclose(sample(pretrained_lora_path=str(newest(whole) / "lora")), sample())


def test_frozen_blocks_that_come_and_go_change_nothing(train, diffusion_content, tmp_path):
    """Values are copied, not computed: adapters are the same to the bit, in both directions of the model."""
    section = {**diffusion_content["model"], "depth": 2, "depth_single_blocks": 3}
    torch.manual_seed(5)
    save_safetensors(build_module(dict(section), MODELS).state_dict(), tmp_path / "base.safetensors")
    base = {**section, "from_pretrained": str(tmp_path / "base.safetensors")}
    options = dict(model={**base, "quantize": "int8"}, lora_config=LORA, max_steps=2, grad_checkpoint=True)
    there, loads = train("there", **options), []
    with pytest.MonkeyPatch.context() as patch:
        bring = BlockStream._bring
        patch.setattr(BlockStream, "_bring", lambda self, number: loads.append(number) or bring(self, number))
        with pytest.raises(UserError, match=r"its weights need [\d.]+ MiB"):
            train("little", **options, weights_memory="1KB")
        moving = train("moving", **options, weights_memory="310KB")
    assert same(*(weights(folder, "lora/adapter_model.safetensors") for folder in (there, moving)))
    assert set(loads) == {2, 3, 4}
    assert any(later < earlier for earlier, later in itertools.pairwise(loads))
    for more, message in (({"grad_checkpoint": False}, "a block comes again"), ({"lora_config": None}, "lora_config")):
        with pytest.raises(UserError, match=message):
            train("refused", **{**options, **more, "model": base}, weights_memory="310KB")


def test_starts_from_an_image_model(train, diffusion_content, tmp_path):
    section = {**diffusion_content["model"], "cond_embed": False, "guidance_embed": True}
    torch.manual_seed(7)
    image_model = build_module(section, MODELS)
    file = tmp_path / "flux.safetensors"
    save_safetensors(image_model.state_dict(), file)
    model = {**diffusion_content["model"], "from_pretrained": str(file)}
    with pytest.raises(UserError, match=r"set model\.strict_load=False"):
        train("strict", model=model)
    state = weights(train("flux", model={**model, "strict_load": False}, max_steps=1, **STILL))
    assert state["cond_in.weight"].abs().max() == 0
    assert torch.equal(state["img_in.weight"], image_model.img_in.weight)
    assert not any(key.startswith("guidance_in") for key in state)


def test_frozen_parts_and_recomputing(train):
    plain = train("plain", max_steps=2, freeze_layers=["txt_in", "double_blocks.*.txt_mlp"])
    first = train("first", max_steps=1, freeze_layers=["txt_in", "double_blocks.*.txt_mlp"])
    moved = {key for key, value in weights(plain).items() if not torch.equal(value, weights(first)[key])}
    assert moved
    assert not any(key.startswith("txt_in") or ".txt_mlp." in key for key in moved)
    content = dict(max_steps=2, freeze_layers=["txt_in", "double_blocks.*.txt_mlp"], grad_checkpoint=True)
    assert same(weights(plain), weights(train("recomputed", **content)))
    assert same(weights(plain), weights(train("offloaded", **content, grad_ckpt_buffer_size=100_000)))


def test_weights_of_a_resumed_run_lie_where_new_ones_would(train, monkeypatch):
    """Kernels of a CPU round by where a tensor begins: the last bit of a loss would depend on the file's header."""
    folder = train("part", max_steps=1, ckpt_shard_size_gb=2e-5)  # many files, whose headers differ in length
    places = {}

    def model(trainer, start):
        places.update({name: p.data_ptr() % 64 for name, p in built(trainer, start).model.named_parameters()})
        raise KeyboardInterrupt

    built = Trainer._model
    monkeypatch.setattr(Trainer, "_model", model)
    with pytest.raises(KeyboardInterrupt):
        train("again", "--load", str(folder), max_steps=2)
    assert set(places.values()) == {0}


def test_bf16_resumes_exactly(train, base):
    options = dict(dtype="bf16", model=base, save_master_weights=True, load_master_weights=True, accumulation_steps=2)
    whole = train("whole", max_steps=4, ckpt_every=2, **options)
    assert {value.dtype for value in weights(whole).values()} == {torch.bfloat16}
    part = first_half(whole)
    train("again", "--load", str(part), max_steps=4, ckpt_every=2, **options)
    for name in ("model/model.safetensors", "master.safetensors", "ema.safetensors"):
        assert same(weights(whole, name), weights(part, name))
    master, exact = (
        weights(whole, "master.safetensors"),
        weights(train("exact", max_steps=4, **{**options, "dtype": "fp32"})),
    )
    start = load_file(base["from_pretrained"])
    moved = torch.cat([(exact[key] - start[key]).flatten() for key in exact])
    error = torch.cat([(master[key] - exact[key]).flatten() for key in exact])
    assert error.norm() < 0.3 * moved.norm()


def test_images_and_clips_mix_with_every_picture_condition(train, table, tmp_path):
    rows = pd.read_csv(table)
    for i in range(2):
        path = save_image(np.full((32, 32, 3), 60 * i, np.uint8), tmp_path / f"{i}.png")
        rows.loc[len(rows)] = dict(path=str(path), text="flat", num_frames=1, height=32, width=32, fps=float("nan"))
    rows.to_csv(tmp_path / "mixed.csv", index=False)
    folder = train(
        "mixed",
        dataset=dict(type="video_text", data_path=str(tmp_path / "mixed.csv"), fps_max=24),
        bucket_config={"32px_ar1:1": {1: (1.0, 2), 5: (1.0, 2), 9: ((1.0, 0.5), 2)}},
        condition_config=dict(i2v_head=1, i2v_tail=1, i2v_loop=1),
        no_i2v_ref_loss=True, record_time=True, warmup_ae=True, max_steps=8, ckpt_every=0,
    )  # fmt: skip
    names = set(curves(folder).Tags()["scalars"])
    assert {"loss_bucket/1x32x32", "loss_bucket/9x32x32", "loss_bucket/5x32x32"} <= names
    assert {"loss", "grad_norm", "lr", "samples_per_s", "tokens_per_s", "tflops_per_s", "data_wait"} <= names
    assert {"memory_gib", *(f"seconds/{stage}" for stage in ("encode", "forward", "backward", "update"))} <= names
    assert any(name.startswith("loss_time/") for name in names)


def test_high_compression(train, diffusion_content, table, tmp_path):
    rows = pd.read_csv(table)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
        path = save_video(pixels, tmp_path / f"{i}.mp4", 8)
        rows.loc[i] = dict(path=str(path), text="noise", num_frames=8, height=64, width=64, fps=8.0)
    rows[:2].to_csv(tmp_path / "large.csv", index=False)
    coder = dict(width_list=[8, 8, 8, 32, 32, 32], depth_list=[1] * 6)
    model = {**diffusion_content["model"], "in_channels": 16, "patch_size": 1}
    folder = train(
        "hc",
        dataset=dict(type="video_text", data_path=str(tmp_path / "large.csv"), fps_max=24),
        bucket_config={"64px_ar1:1": {8: (1.0, 2)}},
        ae=dict(type="dc_ae", from_scratch=True, latent_channels=16, encoder=coder, decoder=coder),
        model=model, patch_size=1, is_causal_vae=False, max_steps=2,
    )  # fmt: skip
    assert "loss_bucket/8x64x64" in curves(folder).Tags()["scalars"]


def test_validation_and_samples(train, table, tmp_path):
    pd.read_csv(table)[:3].to_csv(tmp_path / "held_out.csv", index=False)
    size = dict(resolution="32px", aspect_ratio="1:1", num_frames=5, num_steps=2)
    seen = dict(
        validation=dict(data_path=str(tmp_path / "held_out.csv"), every=2, max_rows=2, timesteps=[0.25, 0.75]),
        samples=dict(prompts=["a circle", "a square"], every=4, fps=8, sampling_option=size),
    )
    folder = train("seen", max_steps=4, **seen)
    unseen = train("unseen", max_steps=4)
    assert same(weights(folder), weights(unseen))  # looking changes nothing
    assert scalars(folder, "loss") == scalars(unseen, "loss")
    losses = scalars(folder, "val_loss")
    assert list(losses) == [2, 4]
    parts = [scalars(folder, f"val_loss_time/{t}") for t in ("0.25", "0.75")]
    assert losses[2] == pytest.approx((parts[0][2] + parts[1][2]) / 2)
    made = sorted(p.name for p in (folder / "samples" / "step0000004").iterdir())
    assert made == ["0000.mp4", "0000.txt", "0001.mp4", "0001.txt"]
    frames, fps = read_video(folder / "samples" / "step0000004" / "0001.mp4")
    assert (frames.shape, fps) == ((5, 32, 32, 3), 8)
    assert set(curves(folder).Tags()["images"]) == {"sample/0000", "sample/0001"}
    still = train("still", max_steps=4, validation=seen["validation"], **STILL)
    assert len(set(scalars(still, "val_loss").values())) == 1  # same weights, same number


def test_steps_without_a_finite_loss_are_skipped(train, monkeypatch, caplog):
    micro_step = TrainLoop._micro_step

    def broken(self, batch, losses, i):
        def turns(batch, generator):
            for turn in losses(batch, generator):
                yield turn._replace(loss=turn.loss * float("inf")) if self.states.global_step in bad else turn

        return micro_step(self, batch, turns, i)

    monkeypatch.setattr(TrainLoop, "_micro_step", broken)
    bad = {0, 2}
    folder = train("skipped", max_steps=4, ckpt_every=1)
    assert load_states(newest(folder)).skipped_steps == 2
    states = [load_file(p / "model" / "model.safetensors") for p in list_checkpoints(folder)]
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    assert all(value.isfinite().all() for value in states[3].values())
    bad = set(range(100))
    with pytest.raises(UserError, match=r"3 steps in a row .* the last batch held row \d \(.*\.mp4\), row \d"):
        train("stopped", max_steps=50, max_skipped_steps=3)


def test_going_on_elsewhere_and_with_another_rate(train):
    folder = train("first", max_steps=3)
    train("on", "--load", folder, "--lr", 1e-5, "--start-epoch", 0, "--start-step", 0, max_steps=5, ckpt_every=0)
    assert load_states(newest(folder)).micro_step == 2
    assert max(scalars(folder, "lr").values()) > 1e-5
    assert scalars(folder, "lr")[4] <= 1e-5


SIZE = ("--samples.sampling_option.height", "32", "--samples.sampling_option.width", "32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset.data-path", "OTHER"], r"missing column 'text' .*is 'txt' meant"),
        (["--bucket_config", "{'32px': {33: (1.0, 2)}}"], "no bucket has a full.*0 of 6 rows.*6 rows fit no length"),
        (["--bucket_config", "{'32pixels': {9: (1.0, 2)}}"], "32pixels"),
        (["--cached_video", "True", "--cached_text", "True"], "cache"),
        (["--validation.data_path", "TABLE"], "this is the training table"),
        (["--samples.prompts", "a", "--samples.sampling_option.num_frames", "6", *SIZE], "samples: num_frames=6.*near"),
        (["--model.from_pretrained", "SAVED", "--model.hidden_size", "64", "--model.axes_dim", "8,12,12"],
         r"made with hidden_size=32, the config says 64"),
        (["--load", "CHECKPOINT", "--model.depth", "2", "--max-steps", "9"], r"made with depth=1, the config says 2"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_the_model_is_built(train, base, table, tmp_path, monkeypatch, words, message):
    rows = pd.read_csv(table)
    rows.rename(columns={"text": "txt"}).to_csv(tmp_path / "other.csv", index=False)
    names = {"OTHER": str(tmp_path / "other.csv"), "TABLE": table, "SAVED": base["from_pretrained"]}
    if "CHECKPOINT" in words:
        names["CHECKPOINT"] = str(newest(train("one", max_steps=1)))
    monkeypatch.setattr(Trainer, "_build", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(UserError) as caught:
        train("bad", *(names.get(word, word) for word in words))
    assert re.search(f"(?s){message}", str(caught.value)), caught.value


def test_cached_latents_and_texts_train_the_same(train, diffusion_content, tmp_path, write_config):
    torch.manual_seed(0)
    ae = {**diffusion_content["ae"], "from_pretrained": str(tmp_path / "ae.safetensors")}
    save_safetensors(build_module(dict(diffusion_content["ae"]), MODELS).state_dict(), ae["from_pretrained"])
    config = write_config(tmp_path / "cached.py", {**diffusion_content, "ae": ae})
    cache = cache_writer(parse_config([config, "--cache-dir", str(tmp_path / "cache")], CacheOptions)).run()
    plain = train("plain", ae=ae)
    cached = train("cached_run", ae=ae, cached_video=True, cached_text=True, cache_dir=str(cache))
    losses = scalars(plain, "loss")
    assert scalars(cached, "loss") == pytest.approx(losses, rel=1e-4)  # encoded in other batches
    assert list(losses) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["demo_cpu", "demo_cpu_i2v", "demo_cpu_lora", "demo_cpu_hc"])
def test_small_configs_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = []
    for frames in (1, 8, 16, 17):
        pixels = np.random.default_rng(frames).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
        image = frames == 1
        path = save_image(pixels[0], tmp_path / "1.png") if image else save_video(pixels, tmp_path / f"{frames}.mp4", 8)
        fps = float("nan") if image else 8.0
        rows.append(dict(path=str(path), text="noise", num_frames=frames, height=64, width=64, fps=fps))
    pd.DataFrame(rows).to_csv(tmp_path / "clips.csv", index=False)
    config = f"configs/diffusion/train/{name}.py"
    lengths = load_config(config, TrainOptions).bucket_config["64px_ar1:1"]
    words = [
        *("--dataset.data-path", tmp_path / "clips.csv", "--outputs", tmp_path, "--device", "cpu"),
        *("--bucket_config", {"64px_ar1:1": dict.fromkeys(lengths, (1.0, 1))}, "--max-steps", 2, "--log-every", 1),
    ]
    losses = scalars(Trainer(parse_config([config, *map(str, words)], TrainOptions)).run(), "loss")
    assert len(losses) == 2
    assert np.isfinite(list(losses.values())).all()


def test_compiled_blocks_train_to_the_same_weights(train, base, monkeypatch):
    """With gradient checkpointing around them. What makes kernels is left out here: it takes long."""
    monkeypatch.setattr(
        "opensora.training.diffusion.trainer.compile_and_tell", lambda model, name: compile_blocks(model, "aot_eager")
    )
    counters.clear()
    runs = {
        name: train(name, "--compile", name == "compiled", model=base, grad_checkpoint=True)
        for name in ("plain", "compiled")
    }
    assert counters["stats"]["unique_graphs"] >= 2
    found = {name: weights(folder) for name, folder in runs.items()}
    started = load_file(base["from_pretrained"])
    for name, value in found["plain"].items():
        torch.testing.assert_close(found["compiled"][name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, started[name]) for name, value in found["plain"].items())
