"""``--offload blocks`` and ``disk``: the same videos with as much of the device's memory as there is."""

import gc
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora.acceleration.placing import held_by
from opensora.acceleration.scratch import is_in, mapped_ranges
from opensora.acceleration.streaming import BlockStream
from opensora.config import load_config, parse_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion import fitting, loading
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.generation.dry_run import dry_run_report
from opensora.generation.jobs import list_jobs
from opensora.generation.requests import read_requests
from opensora.utils import weights_loading
from opensora.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config):
    """Three double and four single blocks."""
    sizes = {"depth": 3, "depth_single_blocks": 4, "hidden_size": 96, "axes_dim": [16, 16, 16]}
    return {**tiny_config, "model": {**tiny_config["model"], **sizes}, "batch_size": 2}


@pytest.fixture(scope="module")
def expected(config):
    return VideoPipeline.from_config(config)(["a", "b"], seed=3, num_steps=2).latents


def least(config, **overrides):
    """The least memory that works, as the refusal of a run with nothing says."""
    with pytest.raises(UserError, match="is the least that works") as refused:
        VideoPipeline.from_config(config, gpu_memory="1KB", **overrides)
    return re.search(r"--gpu-memory (\S+) is the least", str(refused.value))[1]


@pytest.fixture
def loads(monkeypatch):
    """Streams of a run, in order."""
    made = []
    original = BlockStream.__init__

    def init(self, *args):
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(BlockStream, "__init__", init)
    return made


@pytest.mark.parametrize("offload", ["blocks", "disk"])
def test_same_latents_with_the_least_memory(config, expected, offload, loads):
    pipe = VideoPipeline.from_config(config, offload=offload, gpu_memory=least(config, offload=offload))
    for _ in range(2):
        assert torch.equal(pipe(["a", "b"], seed=3, num_steps=2).latents, expected)
    assert [len(stream.blocks) for stream in loads] == [7, 7], "the small T5 fits whole"
    assert len(loads[0].streamed) > 1


def test_all_there_where_the_memory_is(config, expected, loads):
    for limit in ({}, {"gpu_memory": "1GB"}):
        pipe = VideoPipeline.from_config(config, offload="blocks", **limit)
        assert torch.equal(pipe(["a", "b"], seed=3, num_steps=2).latents, expected)
    assert loads == []


def test_text_encoder_in_blocks(config, tmp_path, loads):
    """A T5 of six blocks, larger than the rest."""
    from transformers import T5Config, T5EncoderModel

    demo = Path(config["t5"]["from_pretrained"])
    own = {**json.loads((demo / "config.json").read_text()), "num_layers": 6, "d_ff": 2000}
    T5EncoderModel(T5Config(**own)).save_pretrained(tmp_path)
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path)
    config = {**config, "t5": {**config["t5"], "from_pretrained": str(tmp_path)}}
    plain = VideoPipeline.from_config(config).encode_prompt(["a", "b"]).txt
    for offload in ("blocks", "disk"):
        limit = least(config, offload=offload)
        pipe = VideoPipeline.from_config(config, offload=offload, gpu_memory=limit)
        assert torch.equal(pipe.encode_prompt(["a", "b"]).txt, plain)
    assert [len(stream.blocks) for stream in loads] == [6, 6]
    assert loads[0].loads[:5] == [1, 2, 3, 4, 5], "the first, a little larger, stays"


@pytest.mark.parametrize(("merge", "offload"), [(True, "disk"), (False, "blocks")])
def test_adapters_step_caches_and_pictures(config, tmp_path, merge, offload):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["proj", "lin", "linear2"], init_lora_weights=False)
    peft.get_peft_model(VideoPipeline.from_config(config).models["model"], settings).save_pretrained(tmp_path)
    changes = {"pretrained_lora_path": str(tmp_path), "merge_lora": merge, "cond_type": "i2v_head"}
    cache = {"step_cache": "first_block", "step_cache_threshold": 0.5}
    picture = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()

    def made(**overrides):
        pipe = VideoPipeline.from_config(config, **changes, **overrides)
        return pipe("a", ref=picture, seed=3, num_steps=4, **cache).latents

    assert torch.equal(made(offload=offload, gpu_memory=least(config, offload="blocks", **changes)), made())


def test_quantised_weights_come_as_they_are_stored(config, loads):
    changes = {"model.quantize": "int8", "model.hidden_size": 192, "model.axes_dim": [32, 32, 32]}
    plain = VideoPipeline.from_config(config, **changes)("a", seed=3, num_steps=1).latents
    pipe = VideoPipeline.from_config(
        config, offload="blocks", gpu_memory=least(config, offload="blocks", **changes), **changes
    )
    assert torch.equal(pipe("a", seed=3, num_steps=1).latents, plain)
    assert {piece.like.dtype for piece in loads[0].blocks[0].pieces} == {torch.int8, torch.float32}


def test_branches_share_a_pass_over_the_weights(config, monkeypatch, loads):
    """Also where they are no one batch, which would round differently."""
    monkeypatch.setattr("opensora.diffusion.velocity.MAX_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(fitting, "MAX_TOKENS_AT_ONCE", 1)
    plain = VideoPipeline.from_config(config)("a", seed=3, num_steps=3).latents
    limit = least(config, offload="blocks")
    pipe = VideoPipeline.from_config(config, offload="blocks", gpu_memory=limit)
    assert torch.equal(pipe("a", seed=3, num_steps=3).latents, plain)
    (stream,) = loads
    assert len(stream.streamed) > 2
    assert len(stream.loads) <= 3 * len(stream.streamed) + 1, "two branches in each of three steps"


def test_an_error_in_a_branch_comes_out_and_leaves_nothing(config, monkeypatch):
    monkeypatch.setattr("opensora.diffusion.velocity.MAX_TOKENS_AT_ONCE", 1)
    pipe = VideoPipeline.from_config(config, offload="blocks", gpu_memory=least(config, offload="blocks"))
    model = pipe.models["model"]
    places = [held.tensor.data_ptr() for held in held_by(model)]

    def fail(*_):
        raise KeyError("broken")

    hook = model.single_blocks[1].linear2.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="broken"):
        pipe("a", seed=3)
    hook.remove()
    assert [held.tensor.data_ptr() for held in held_by(model)] == places
    assert pipe("a", seed=3, num_steps=1).latents.isfinite().all()


def test_weights_on_disk_are_in_files(config, monkeypatch):
    """All of the blocks' weights, random as they are."""
    monkeypatch.setattr("opensora.acceleration.scratch.SMALL", 1)
    pipe = VideoPipeline.from_config(config, offload="disk")
    ranges = mapped_ranges()
    for name in ("model", "t5"):
        blocks = fitting.blocks_of(pipe.models[name])
        assert blocks
        assert all(is_in(held.tensor, ranges) for block in blocks for held in held_by(block))


def bytes_in_memory() -> int:
    """Of all tensors that are alive and not parts of files."""
    ranges = mapped_ranges()
    alive = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_meta]
    storages = {each.untyped_storage().data_ptr(): each for each in alive if each.numel() and not is_in(each, ranges)}
    return sum(each.untyped_storage().nbytes() for each in storages.values())


def test_host_memory_does_not_grow_with_the_model(config, tmp_path, monkeypatch):
    """Neither while weights are converted and merged with an adapter, nor while they are used."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("opensora.acceleration.scratch.SMALL", 1 << 13)
    settings = peft.LoraConfig(r=2, target_modules=["linear2", "v_mlp"], init_lora_weights=False)
    model = VideoPipeline.from_config(config).models["model"]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "lora")
    files = {"ckpt_path": str(tmp_path / "model.safetensors"), "pretrained_lora_path": str(tmp_path / "lora")}
    limit = least(config, offload="disk", dtype="bf16", **files)
    whole, before, seen = sum(weight.nbytes for weight in model.parameters()) // 2, bytes_in_memory(), []
    calls = itertools.count()
    inspected = weights_loading.check_finite

    def watched(*args):
        if next(calls) % 100 == 50:
            seen.append(bytes_in_memory() - before)
        return inspected(*args)

    monkeypatch.setattr(weights_loading, "check_finite", watched)
    pipe = VideoPipeline.from_config(config, offload="disk", gpu_memory=limit, dtype="bf16", **files)
    loading_peak, used = max(seen), []
    found = pipe("a", seed=3, num_steps=2, on_step=lambda *_: used.append(bytes_in_memory() - before)).latents
    assert len(seen) > 1
    assert loading_peak < 0.2 * whole
    assert max(used) < 0.6 * whole, "slots, what stays in place, the table and the other models"
    assert used[0] == used[-1]
    assert torch.equal(
        found, VideoPipeline.from_config(config, dtype="bf16", **files)("a", seed=3, num_steps=2).latents
    )


def test_too_little_is_refused_before_models_are_loaded(config, monkeypatch):
    monkeypatch.setattr(loading, "build_ready", None)
    told = r"gpu_memory 1KB: model needs \S+ MiB of it at least.*fewer frames"
    for offload in ("blocks", "disk"):
        with pytest.raises(UserError, match=told):
            VideoPipeline.from_config(config, offload=offload, gpu_memory="1KB")


def test_longer_videos_need_more(config):
    def needed(frames):
        text = least(config, offload="blocks", num_frames=frames)
        assert text.endswith("MB")
        return float(text[:-2])

    assert needed(65) > 1.5 * needed(9)


def test_a_dry_run_says_what_comes_and_goes(config, tmp_path):
    limit = least(config, offload="blocks")
    changes = {"offload": "blocks", "gpu_memory": limit, "prompt": "a", "save_dir": str(tmp_path)}
    cfg = load_config(config, InferenceOptions, changes)
    run = PreparedRun.of(cfg, CPU)
    report = dry_run_report(run, list_jobs(cfg, read_requests(cfg, tmp_path)))
    assert "offload blocks" in report
    assert re.search(r"blocks +model: [4-7] of 7 come and go, \S+ MiB for each evaluation; the least is", report)
    assert re.search(r"blocks +t5: 0 of 2 come and go", report)


def test_values_of_the_key(tiny_config_file):
    for words, value in ((["--offload", "blocks"], "blocks"), (["--offload"], True), (["--offload", "no"], False)):
        assert parse_config([str(tiny_config_file), *words], InferenceOptions).offload == value
    with pytest.raises(UserError, match="--offload bloks: expected true or false or one of blocks, disk"):
        parse_config([str(tiny_config_file), "--offload", "bloks"], InferenceOptions)
