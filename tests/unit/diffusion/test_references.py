"""Every condition, from every kind of file, through the pipeline."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.config.choices import CONDITIONS
from opensora.datasets.transforms import resize_crop, to_model_range
from opensora.diffusion import pipeline, stages
from opensora.diffusion.conditions import get_spans
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.references import check_references, locate_references, per_prompt_references, read_clips
from opensora.generation.requests import read_requests
from opensora.utils.errors import UserError
from opensora.utils.video import read_video, save_image, save_video
from tests.unit.utils.media_files import edited, numbered, scene, write_clip


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


@pytest.mark.parametrize("cond_type", [name for name in CONDITIONS if name == "t2v" or get_spans(name)])
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
    original = stages.on_device

    def watched(model, device, offload):
        name = next(name for name, each in pipe.models.items() if each is model)
        assert offload == pipe.cfg.offload
        manager = original(model, device, offload)

        class Watch:
            def __enter__(self):
                events.append(f"+{name}")
                return manager.__enter__()

            def __exit__(self, *error):
                events.append(f"-{name}")
                return manager.__exit__(*error)

        return Watch()

    monkeypatch.setattr(stages, "on_device", watched)
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


class Spec:
    """What :func:`read_clips` asks of an autoencoder: four frames a latent one after the first."""

    is_causal = True
    compression = (4, 8, 8)


def read(ref, cond_type="i2v_head", height=32, width=32):
    """Pixels of a reference as the autoencoder gets them: uint8 [T, H, W, 3]."""
    (sources,) = per_prompt_references(ref, 1, Path())
    check_references(sources, cond_type, Spec())
    (clip,) = read_clips(sources, cond_type, Spec(), height, width)
    return ((clip.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().astype(np.uint8)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


def test_a_clip_given_for_a_picture_is_scaled_as_a_clip(tmp_path):
    smooth = scene(3)
    path = write_clip(tmp_path / "a.mp4", smooth, options={"crf": "5"})
    found = read(str(path), height=40, width=40)
    whole, _ = read_video(path)
    expected = resize_crop(to_model_range(whole), 40, 40)[:, :1]
    np.testing.assert_array_equal(found, ((expected.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
    save_image(whole[0], tmp_path / "a.png")
    assert np.abs(read(str(tmp_path / "a.png"), height=40, width=40).astype(int) - found).max() > 5
    np.testing.assert_array_equal(read(whole[:1], height=40, width=40), found)
    np.testing.assert_array_equal(read(whole[0], height=40, width=40), read(tmp_path / "a.png", height=40, width=40))


@pytest.mark.parametrize(
    "kind", ["pil", "turned pil", "float", "gray", "rgba", "tensor", "float tensor", "list", "path"]
)
def test_references_of_programs(tmp_path, picture, kind):
    given = {
        "pil": Image.fromarray(picture),
        "float": picture / np.float32(255),
        "gray": picture[..., 0],
        "rgba": np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1),
        "tensor": torch.from_numpy(picture.transpose(2, 0, 1).copy()),
        "float tensor": torch.from_numpy(picture.transpose(2, 0, 1) / 255.0),
        "list": [Image.fromarray(picture)],
        "path": save_image(picture, tmp_path / "a.png"),
    }
    if kind == "turned pil":
        exif = Image.Exif()
        exif[0x112] = 8
        Image.fromarray(np.ascontiguousarray(np.rot90(picture, -1))).save(tmp_path / "t.png", exif=exif)
        given[kind] = Image.open(tmp_path / "t.png")
    expected = picture[..., :1].repeat(3, axis=-1) if kind == "gray" else picture
    np.testing.assert_array_equal(read(given[kind], height=45, width=70)[0], expected)


def test_a_program_may_give_clips_in_any_layout(clip):
    for layout in (clip, clip.transpose(3, 0, 1, 2), clip.transpose(0, 3, 1, 2), torch.from_numpy(clip / 255.0)):
        np.testing.assert_array_equal(read(layout, "v2v_tail"), clip[-33:])


@pytest.mark.parametrize(
    "bad", [3, b"x", {"a": 1}, np.zeros((4, 4, 3)) - 1, object()], ids=lambda bad: type(bad).__name__
)
def test_what_is_no_reference_is_refused_by_its_place(picture, bad):
    with pytest.raises(UserError, match=r"reference 2 of prompt 1: .*expected pixels"):
        per_prompt_references([picture, bad], 1, Path())
    with pytest.raises(UserError, match=r"reference 1 of prompt 2: .*expected pixels"):
        per_prompt_references([picture, bad], 2, Path())


def test_the_home_folder_in_references(tmp_path, monkeypatch, picture):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_image(picture, tmp_path / "a.png")
    (tmp_path / "elsewhere").mkdir()
    assert locate_references("~/a.png; b.png;~no-such-user/c.png", tmp_path, tmp_path / "elsewhere") == [
        str(tmp_path / "a.png"),
        "b.png",
        "~no-such-user/c.png",
    ]
    np.testing.assert_array_equal(read("~/a.png", height=45, width=70)[0], picture)


def test_a_clip_that_an_edit_list_makes_too_short_is_named(tmp_path):
    source = write_clip(tmp_path / "a.mp4", numbered(40), options={"g": "12"})
    path = edited(source, tmp_path / "trimmed.mp4", 0, 30)
    with pytest.raises(UserError, match=r"trimmed\.mp4 has 30 frames, v2v_head needs 33"):
        read(str(path), "v2v_head")
    with pytest.raises(UserError, match=r"trimmed\.mp4 has 30 frames, v2v_tail needs 33"):
        read(path, "v2v_tail")
