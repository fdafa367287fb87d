"""What ranks that work on the same samples share of encoding; validation and samples divided over the others."""

import pprint
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

from opensora.acceleration.parallel_context import Axis, ParallelContext
from opensora.acceleration.parallel_vae import SharedOutOfMemoryError, TileRunner, share_tiles, together
from opensora.config import parse_config
from opensora.config.commands import TrainOptions
from opensora.datasets.dataloader import to_device
from opensora.diffusion.decode import Gathered, decode_into
from opensora.models.hunyuan_vae import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.vae.tiling import Tiling
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.inputs import InputEncoder, InputOptions
from opensora.training.diffusion.samples import SamplesHook, sample_rounds, sampling_config
from opensora.training.diffusion.sharing import ClipEncoder, embed_shared
from opensora.training.diffusion.trainer import Trainer
from opensora.training.diffusion.validation import Validation
from opensora.training.weights.adapters import TrainedWeights
from opensora.utils.video import save_video
from tests.conftest import tiny_inference_config
from tests.parallel.checks_training import tiny_run
from tests.parallel.harness import assert_close
from tests.parallel.tiny import context

CPU = torch.device("cpu")
SMALL = dict(latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
TILES = dict(sample_size=16, sample_tsize=8, use_spatial_tiling=True, use_temporal_tiling=True)


def pair() -> Axis:
    """Both ranks."""
    return context().dp


def autoencoder(**options: Any) -> AutoencoderKLCausal3D:
    torch.manual_seed(0)
    return AutoencoderKLCausal3D(HunyuanVAEConfig(**SMALL, **options)).eval().requires_grad_(False)


def counting(network: Any, name: str) -> list[int]:
    """Sizes of the batches that a method of a module is called with from now on."""
    calls: list[int] = []
    run = getattr(network, name)

    def counted(x: Any, *more: Any) -> Any:
        calls.append(len(x))
        return run(x, *more)

    setattr(network, name, counted)
    return calls


def clips_are_encoded_once(folder: Path) -> None:
    """Each by one of the ranks, none by both; the result is that of one process, in both precisions."""
    ae, clips = autoencoder(), torch.randn(5, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        expected = ClipEncoder(ae.to(dtype))(clips.to(dtype))
        calls = counting(ae, "encode_stored")
        found = ClipEncoder(ae, pair())(clips.to(dtype))
        del ae.encode_stored
        assert calls == [3], "three of five, the last one twice so that both are done at the same time"
        assert_close(found.float(), expected.float(), str(dtype), limit)
        both = [torch.empty_like(found) for _ in range(2)]
        dist.all_gather(both, found)
        assert torch.equal(*both)


def a_clip_alone_is_encoded_in_tiles(folder: Path) -> None:
    """Fewer clips than ranks: bit for bit what one process makes of it."""
    ae, clip = autoencoder(**TILES), torch.randn(1, 3, 9, 24, 16, generator=torch.Generator().manual_seed(1))
    every = counting(ae.encoder, "forward")
    expected = ClipEncoder(ae)(clip)
    tiles = len(every)
    every.clear()
    assert torch.equal(ClipEncoder(ae, pair())(clip), expected)
    assert 0 < len(every) < tiles
    assert ae.tiling.runner is None, "only while this encodes"


def texts_are_embedded_once(folder: Path) -> None:
    tiny = tiny_inference_config()
    t5 = build_module(dict(tiny["t5"]), MODELS, torch_dtype=torch.float32)
    texts = ["a red circle", "a blue square moves up", "grass"]
    expected, calls = t5(texts), []
    tokenized = counting(t5, "tokenize")

    def embed(some: list[str]) -> torch.Tensor:
        calls.append(len(some))
        return t5(some)

    embed.tokenize = t5.tokenize  # type: ignore[attr-defined]
    assert_close(embed_shared(embed, texts, pair()), expected)
    assert calls == [2]
    assert sum(tokenized) == (3 if pair().first else 2), "the first rank has seen all of them, for the log"
    embed_shared(embed, texts[:1], pair())


def model_and_encoders(axis: Axis | None = None) -> tuple[Any, InputEncoder]:
    torch.manual_seed(0)
    tiny = tiny_inference_config()
    model, ae, t5, clip = (
        build_module(dict(tiny[name]), MODELS, torch_dtype=torch.float32) for name in ("model", "ae", "t5", "clip")
    )
    for parameter in model.parameters():  # the last layer is zero, so that all videos would be the same
        torch.nn.init.normal_(parameter, std=0.1)
    options = InputOptions(condition_weights={"t2v": 1, "i2v_head": 1, "i2v_loop": 1})
    return model, InputEncoder(ae, t5, clip, options, None, ClipEncoder(ae, axis), axis)


def inputs_are_those_of_one_process(folder: Path) -> None:
    """The same noise, times, conditions and dropout; of the posterior, too."""
    batch = {
        "video": torch.randn(3, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)),
        **{"text": ["a", "b", "c"], "index": [0, 1, 2], "size": [(9, 32, 32)] * 3},
    }
    ready = [model_and_encoders(axis)[1](dict(batch), torch.Generator().manual_seed(5)) for axis in (None, pair())]
    for name, expected in ready[0]["inputs"].items():
        assert_close(ready[1]["inputs"][name].float(), expected.float(), name)
    assert torch.equal(ready[1]["inputs"]["timesteps"], ready[0]["inputs"]["timesteps"])
    assert_close(ready[1]["target"], ready[0]["target"], "target")


def too_little_memory(network: torch.nn.Module, where: Callable[[], bool]) -> None:
    """A network is out of memory where a condition holds."""
    run = network.forward

    def failing(x: torch.Tensor) -> torch.Tensor:
        if where():
            raise torch.OutOfMemoryError("pretended")
        return run(x)

    network.forward = failing  # type: ignore[method-assign]


def out_of_memory_is_agreed(folder: Path) -> None:
    """One rank has too little memory for its tile: both go over to other tiles, and neither waits for ever."""
    ae, axis = autoencoder(sample_size=24, sample_tsize=8, use_spatial_tiling=True), pair()
    z = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    with ae.tiled():
        expected = Gathered()
        decode_into(expected, ae, z, slice(0, 17), CPU, torch.float32)
    share_tiles(ae, axis)
    failures = []

    def once() -> bool:
        if axis.rank == 1 and not failures:
            failures.append(1)
            return True
        return False

    too_little_memory(ae.decoder, once)
    found = Gathered()
    changed = decode_into(found, ae, z, slice(0, 17), CPU, torch.float32)
    assert changed == "tiles of 24 px and 8 frames"
    assert failures == ([1] if axis.rank == 1 else [])
    np.testing.assert_array_equal(found.videos()[0], expected.videos()[0])


def out_of_memory_beside_the_tiles_is_agreed(folder: Path) -> None:
    """Where they are put together, or frames are handed on; and another error of one rank leaves none waiting."""
    ae, axis = autoencoder(sample_size=24, sample_tsize=8, use_spatial_tiling=True), pair()
    z = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    share_tiles(ae, axis)

    class Full(Gathered):
        tries = 0

        def write(self, frames: np.ndarray) -> None:
            self.tries += 1
            if axis.first and self.tries == 1:
                raise torch.OutOfMemoryError("pretended")
            super().write(frames)

    sink = Full()
    assert decode_into(sink, ae, z, slice(0, 17), CPU, torch.float32) == "tiles of 24 px and 8 frames"
    assert len(sink.videos()[0]) == 17

    class Broken(Gathered):
        def write(self, frames: np.ndarray) -> None:
            if axis.first:
                raise OSError("disk full")
            super().write(frames)

    if axis.first:
        with pytest.raises(OSError, match="disk full"):
            decode_into(Broken(), ae, z, slice(0, 17), CPU, torch.float32)
    else:
        decode_into(Broken(), ae, z, slice(0, 17), CPU, torch.float32)
    too_little_memory(ae.encoder, lambda: axis.rank == 1)
    with pytest.raises(SharedOutOfMemoryError, match="rank 1 of 2"), together(ae):
        ae.encode_stored(torch.randn(1, 3, 9, 32, 32))
    assert isinstance(ae.tiling, Tiling)
    assert isinstance(ae.tiling.runner, TileRunner)


def train_config(folder: Path) -> TrainOptions:
    if dist.get_rank() == 0:
        rng, rows = np.random.default_rng(0), []
        for i in range(5):
            clip = save_video(rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", fps=8)
            rows.append(dict(path=str(clip), text=f"clip {i}", num_frames=9, height=32, width=32, fps=8.0))
        pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
        (folder / "3.mp4").write_bytes(bytes(100))
        tiny = tiny_inference_config()
        content = dict(
            {key: tiny[key] for key in ("model", "ae", "t5", "clip")},
            dataset=dict(type="video_text", data_path=str(folder / "train.csv"), max_broken=0.5),
            bucket_config={"32px_ar1:1": {9: (1.0, 2)}},
            validation=dict(data_path=str(folder / "clips.csv"), max_rows=5, timesteps=[0.2, 0.7]),
            samples=dict(
                prompts=["a circle", "a square", "a star"],
                sampling_option={**tiny["sampling_option"], "num_steps": 2},
            ),
        )
        lines = (f"{key} = {pprint.pformat(value)}" for key, value in content.items())
        (folder / "train.py").write_text("\n".join(lines))
    dist.barrier()
    return parse_config([str(folder / "train.py")], TrainOptions)


def validation_is_divided(folder: Path) -> None:
    """To the last bit the numbers of one process, with a row that cannot be read among them; work is halved."""
    cfg, (model, encode) = train_config(folder), model_and_encoders()
    options = InputOptions(condition_weights={"t2v": 1, "i2v_head": 1})
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    losses, reasons = [], []
    for ranks, expected in ((Axis(), 5 * 2), (pair(), 3 * 2)):
        validation = Validation(cfg, options, ranks)
        losses.append(validation(model, validation.encoder(encode), CPU, torch.float32))
        reasons.append(validation.loader.broken.reasons)
        assert len(forwards) == expected
        forwards.clear()
    assert losses[0] == losses[1]
    assert [*reasons[0]] == [*reasons[1]] == [3]
    assert len([name for name in losses[0] if "condition" not in name]) == 3


def samples_are_divided(folder: Path) -> None:
    """To the last bit the videos of one process, on the first rank; of three prompts a rank makes two."""
    cfg, (model, encode) = train_config(folder), model_and_encoders()
    section, config = cfg.samples, sampling_config(cfg)
    assert section is not None
    found: list[dict[str, np.ndarray]] = []
    for parallel, count in ((ParallelContext(), 3), (context(), 2)):
        kept: dict[str, np.ndarray] = {}
        found.append(kept)
        log: Any = SimpleNamespace(video=lambda name, frames, *_, kept=kept: kept.update({name: frames}))
        run: Any = SimpleNamespace(parallel=parallel, device=CPU, dtype=torch.float32, cfg=cfg)
        place = folder / f"{parallel.world_size}.{parallel.rank}"
        hook = SamplesHook(section, config, TrainedWeights(model, None, None), encode, None, place, run, log)
        calls, make = [], hook.pipeline
        hook.pipeline = lambda *args, calls=calls, make=make, **options: calls.append(1) or make(*args, **options)
        hook.pipeline.models = make.models
        paths = hook.make(1)
        assert len(calls) == count
        assert [path.name for path in paths] == ([f"{n:04d}.mp4" for n in range(3)] if parallel.rank == 0 else [])
    if dist.get_rank() == 0:
        assert len(found[1]) == 3
        assert found[0].keys() == found[1].keys()
        assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
        assert not np.array_equal(*[found[0][f"sample/000{n}"] for n in (0, 1)])
    else:
        assert not found[1]


def runs_do_so(folder: Path) -> None:
    """Whoever works on the same samples in a training run encodes a part of them; others divide held-out rows."""
    if dist.get_rank() == 0:
        tiny_run(folder, plugin="ddp", keep_encoded=True, keep_encoded_memory="1KB", max_steps=1)
        (folder / "held_out.csv").write_text((folder / "clips.csv").read_text())
    dist.barrier()
    words = ["--validation.data_path", str(folder / "held_out.csv"), "--validation.timesteps", "[0.5]"]
    for sp, encoded, held_out in ((2, 1, 8), (1, 2, 4)):
        more = [*words, "--plugin_config.sp_size", str(sp), "--exp-name", f"sp{sp}"]
        torch.manual_seed(0)
        trainer = Trainer(parse_config([str(folder / "train.py"), *more], TrainOptions), 0, 2)
        encoder, batch = trainer._encoder(), next(iter(trainer.loader))
        calls = counting(encoder.ae, "encode_stored")
        encoder(to_device(batch, CPU, torch.float32), torch.Generator())
        assert {*calls} == {encoded}
        assert trainer.validation is not None
        assert len(trainer.validation.own) == held_out
        assert trainer.memory is not None
        assert (trainer.memory.room.limit, trainer.memory.room.used <= 1000) == (1000, True)


def rounds_are_of_one_kind(folder: Path) -> None:
    """All ranks make as many videos of each kind, and every prompt is some rank's."""
    rounds = sample_rounds([True, False, False, True, False, True], 2)
    assert rounds == [[0, 5], [3, 5], [1, 4], [2, 4]]
    assert sample_rounds([False] * 3, 1) == [[0], [1], [2]]


CHECKS = [
    clips_are_encoded_once,
    a_clip_alone_is_encoded_in_tiles,
    texts_are_embedded_once,
    inputs_are_those_of_one_process,
    out_of_memory_is_agreed,
    out_of_memory_beside_the_tiles_is_agreed,
    validation_is_divided,
    samples_are_divided,
    runs_do_so,
    rounds_are_of_one_kind,
]
