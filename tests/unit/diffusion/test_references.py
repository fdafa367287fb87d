"""Every condition, from every kind of file, through the pipeline."""

from pathlib import Path

import av
import numpy as np
import pytest

from opensora.diffusion import pipeline
from opensora.diffusion.conditions import CONDITIONS
from opensora.diffusion.pipeline import VideoPipeline
from opensora.generation.requests import read_requests
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return VideoPipeline.from_config(tiny_config, num_steps=1, num_frames=73)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """65 frames of a gradient that brightens: every frame is told apart by its mean."""
    ramp = np.linspace(0, 60, 32, dtype=np.uint8)[None, None, :, None]
    return np.broadcast_to(ramp + np.arange(65, dtype=np.uint8)[:, None, None, None] * 2, (65, 32, 32, 3)).copy()


def save_webm(frames: np.ndarray, path: Path) -> None:
    """WebM holds other codecs than the h264 that we write."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "mp4", "mov", "mkv", "webm"])
def test_kinds_of_files(pipe, clip, tmp_path, ending):
    path = tmp_path / f"reference.{ending}"
    is_clip = ending in ("mp4", "mov", "mkv", "webm")
    if ending == "webm":
        save_webm(clip[:9], path)
    else:
        save_video(clip[:9], path, 8) if is_clip else save_image(clip[0], path)
    made = pipe("a", ref=str(path), cond_type="i2v_head", seed=1, num_frames=5)
    exact = pipe("a", ref=clip[0], cond_type="i2v_head", seed=1, num_frames=5)
    assert (made.latents[0, :, 0] - exact.latents[0, :, 0]).abs().mean() < 0.1
    assert made.plan.has_image


@pytest.mark.parametrize("cond_type", CONDITIONS)
def test_conditions(pipe, clip, tmp_path, cond_type):
    """What is given depends on the ends of the references that the condition names, and on nothing else."""
    first, last = (str(save_video(frames, tmp_path / f"{i}.mp4", 8, crf=0)) for i, frames in enumerate((clip, clip)))
    ref = None if cond_type == "t2v" else f"{first};{last}"
    assert pipe(["a", "b"], ref=[ref, None], cond_type=cond_type, seed=1).latents.shape == (2, 4, 19, 4, 4)
    if cond_type == "t2v":
        return
    plan = pipe("a", ref=ref, cond_type=cond_type, seed=1).plan
    (refs,) = pipe.encode_references([[first, last]], plan, [1])
    given = {"v2v_head": 9, "v2v_tail": 9, "v2v_head_easy": 17, "v2v_tail_easy": 17}.get(cond_type, 1)
    assert [latent.shape[1] for latent in refs] == [given] * (2 if cond_type == "i2v_loop" else 1)


def test_too_short_for_its_condition(pipe, clip, tmp_path):
    path = save_video(clip[:20], tmp_path / "short.mkv", 8)
    with pytest.raises(UserError, match=r"short\.mkv has 20 frames, v2v_tail needs 33"):
        pipe("a", ref=path, cond_type="v2v_tail")


def test_models_are_on_the_device_one_after_another(tiny_config, monkeypatch):
    """Encoders leave before sampling starts, the diffusion model before decoding; without offload nothing moves."""
    events: list[str] = []
    original = pipeline.on_device

    def watched(model, device, offload):
        name = next(name for name, each in pipe.models.items() if each is model)
        assert offload == pipe.cfg["offload"]
        manager = original(model, device, offload)

        class Watch:
            def __enter__(self):
                events.append(f"+{name}")
                return manager.__enter__()

            def __exit__(self, *error):
                events.append(f"-{name}")
                return manager.__exit__(*error)

        return Watch()

    monkeypatch.setattr(pipeline, "on_device", watched)
    flux = {**tiny_config["model"], "cond_embed": False, "guidance_embed": True}
    picture_ae = {"type": "autoencoder_2d", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
    chain = {"use_t2i2v": True, "img_flux": flux, "img_flux_ae": picture_ae, "img_resolution": "64px"}
    for offload in (True, False):
        pipe = VideoPipeline.from_config({**tiny_config, **chain}, offload=offload, num_steps=1)
        places = {name: next(model.parameters()).data_ptr() for name, model in pipe.models.items()}
        events.clear()
        pipe("a", seed=1)
        names = ["t5", "clip", "img_flux", "img_flux_ae", "ae", "t5", "clip", "model", "ae"]
        assert events == [sign + name for name in names for sign in "+-"], "never two at a time"
        assert places == {name: next(model.parameters()).data_ptr() for name, model in pipe.models.items()}


def test_parquet_table(tiny_config, tmp_path):
    pd = pytest.importorskip("pandas")
    path = tmp_path / "list.parquet"
    pd.DataFrame({"text": ["a", "b"], "seed": [3, None], "motion_score": [2.5, None]}).to_parquet(path)
    cfg = pipeline.load_config(tiny_config, pipeline.InferenceOptions, {"dataset.data_path": str(path)})
    first, second = read_requests(cfg, tmp_path)
    assert (first.text, first.seed, first.motion_score) == ("a", 3, "2.5")
    assert (second.seed, second.motion_score) == (None, None)
