"""Autoencoder training with a discriminator: exact resume, recomputation, freezing, start steps, and mistakes named."""

import shutil

import numpy as np
import pytest
import torch

from opensora.models.autoencoder import LatentSpec
from opensora.models.vae.lpips import LPIPS
from opensora.training.vae.loss import LengthMixer
from opensora.training.vae.trainer import VAETrainer
from opensora.utils.errors import UserError
from tests.helpers.vae_runs import (
    AUTOENCODER,
    AVERAGE,
    DISCRIMINATOR,
    JUDGE,
    MODELS,
    OPTIMIZER,
    newest,
    tiny_run,
    weights,
    write_clips,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four random clips."""
    return write_clips(tmp_path_factory.mktemp("vae_clips"))


@pytest.fixture
def train(tmp_path, table):
    """Runs a tiny training; returns its newest checkpoint."""

    def run(kind, name=None, /, **changes):
        cfg = tiny_run(kind, table, tmp_path / "outputs", **{"exp_name": name, **changes})
        return newest(VAETrainer(cfg).run())

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def flat(state):
    """Tensors and numbers of nested containers, in order."""
    if isinstance(state, dict):
        return [item for key in sorted(state, key=str) for item in flat(state[key])]
    if isinstance(state, list | tuple):
        return [item for value in state for item in flat(value)]
    return [state.tolist() if torch.is_tensor(state) else state]


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_equals_one_never_stopped(kind, train, tmp_path):
    options = dict(
        max_steps=4,
        ckpt_every=2,
        accumulation_steps=2,
        mixed_strategy="mixed_video_random",
        lr_scheduler=dict(warmup_steps=3),
        disc_lr_scheduler=dict(warmup_steps=1, cosine=True),
        disc_loss_config=dict(disc_start=1, disc_loss_type="wgan-gp" if kind == "dc_ae" else "vanilla"),
    )
    whole = train(kind, "whole", **options)
    (tmp_path / "outputs" / "parts").mkdir()
    shutil.copytree(
        next(whole.parent.glob("epoch*-global_step2")), start := tmp_path / "outputs" / "parts" / "epoch2-global_step2"
    )
    resumed = train(kind, load=str(start), **options)
    assert resumed.parent.name == "parts"
    files = (AUTOENCODER, AVERAGE, JUDGE)
    assert same(weights(whole, *files), weights(resumed, *files))  # bitwise
    for name in ("optimizer", "disc_optimizer"):
        a, b = (torch.load(run / name / "state.pt", weights_only=True) for run in (whole, resumed))
        assert flat(a) == flat(b), name
    log = (whole.parent / "log.txt").read_text()
    assert all(name in log for name in ("gen_loss=", "gen_weight=", "disc_loss=", "logits_real=", "disc_grad_norm="))
    assert "nan" not in log


def test_bf16_goes_on_from_full_precision(train, tmp_path):
    options = dict(max_steps=4, ckpt_every=2, dtype="bf16", optim={**OPTIMIZER, "lr": 1e-5})
    whole = train("dc_ae", "whole", **options)
    first = next(whole.parent.glob("epoch*-global_step2"))
    shutil.copytree(first, start := tmp_path / "outputs" / "parts" / first.name)
    resumed = train("dc_ae", load=str(start), **options)
    files = (AUTOENCODER, AVERAGE, JUDGE, "master.safetensors", "disc_master/model.safetensors")
    assert same(weights(whole, *files), weights(resumed, *files))
    # Steps too small for bf16 are not lost: the fp32 weights move on.
    assert not same(weights(first, "master.safetensors"), weights(whole, "master.safetensors"))


@pytest.mark.parametrize("kind", MODELS)
def test_recomputing_blocks_changes_nothing(kind, train):
    runs = [train(kind, f"again-{again}", grad_checkpoint=again) for again in (False, True)]
    a, b = (weights(run, AUTOENCODER, JUDGE) for run in runs)
    assert all(torch.allclose(a[key], b[key], rtol=1e-5, atol=1e-6) for key in a)


def test_before_its_start_the_adversarial_loss_changes_nothing(train):
    without = train("dc_ae", "without", discriminator=None, optim_discriminator=None)
    late = train("dc_ae", "late", gen_loss_config=dict(gen_start=2))
    assert same(weights(without, AUTOENCODER), weights(late, AUTOENCODER))
    both_late = train("dc_ae", "both-late", gen_loss_config=dict(gen_start=0), disc_loss_config=dict(disc_start=2))
    assert not same(weights(without, AUTOENCODER), weights(both_late, AUTOENCODER))
    # The autoencoder's loss goes through the discriminator and leaves its weights alone.
    trained, untrained = weights(late, JUDGE), weights(both_late, JUDGE)
    fresh = train("dc_ae", "fresh", gen_loss_config=dict(gen_start=9), disc_loss_config=dict(disc_start=9))
    kept = [key for key in untrained if key.endswith(("weight", "bias"))]
    assert all(torch.equal(untrained[key], weights(fresh, JUDGE)[key]) for key in kept)
    assert not all(torch.equal(trained[key], untrained[key]) for key in kept)


def test_frozen_parts_stay(train):
    start = weights(train("hunyuan_vae", "start", optim={**OPTIMIZER, "lr": 1e-30}), AUTOENCODER)
    frozen = train("hunyuan_vae", "all", freeze_layers="all", ckpt_every=1)
    assert all(torch.allclose(weights(frozen, AUTOENCODER)[key], start[key], atol=1e-12) for key in start)
    first = frozen.parent / "epoch0-global_step1"
    assert not same(weights(first, JUDGE), weights(frozen, JUDGE))
    half = weights(train("hunyuan_vae", "half", freeze_layers="encoder,quant_conv"), AUTOENCODER)
    changed = {
        key.split(":")[1].split(".")[0] for key in start if not torch.allclose(half[key], start[key], atol=1e-12)
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_another_kind_of_optimizer_is_named(train):
    done = train("hunyuan_vae", "adam")
    with pytest.raises(UserError, match=r"of another kind, or trains other weights .* set optim\.cls"):
        train("hunyuan_vae", load=str(done), max_steps=9, optim=dict(cls="Muon", lr=1e-3))


def test_a_discriminator_can_join_or_start_anew(train, tmp_path):
    plain = train("dc_ae", "plain", discriminator=None, optim_discriminator=None)
    joined = train("dc_ae", load=str(plain), max_steps=4)
    assert (joined / JUDGE).is_file()
    assert "the discriminator is reinitialised" in (joined.parent / "log.txt").read_text()
    kept, anew = (
        train(
            "dc_ae",
            load=str(joined),
            max_steps=5,
            seed=5,
            restart_disc=restart,
            load_optimizer=False,
            outputs=str(tmp_path / name),
            exp_name=name,
        )
        for restart, name in ((False, "kept"), (True, "anew"))
    )
    before = weights(joined, JUDGE)
    distance = [
        sum(float((weights(run, JUDGE)[key] - before[key]).abs().sum()) for key in before if "weight" in key)
        for run in (kept, anew)
    ]
    assert distance[0] < 0.5 * distance[1]


def test_a_discriminator_that_joined_goes_on_exactly(train, tmp_path):
    """Its schedule is counted from where it joined, whether or not the run is stopped afterwards."""
    plain = train("dc_ae", "plain", discriminator=None, optim_discriminator=None)
    options = dict(max_steps=6, ckpt_every=2, disc_lr_scheduler=dict(warmup_steps=3, cosine=True))
    whole = train("dc_ae", load=str(plain), **options)
    first = next(whole.parent.glob("epoch*-global_step4"))
    shutil.copytree(first, start := tmp_path / "outputs" / "parts" / first.name)
    resumed = train("dc_ae", load=str(start), **options)
    assert same(weights(whole, AUTOENCODER, JUDGE), weights(resumed, AUTOENCODER, JUDGE))
    a, b = (torch.load(run / "disc_optimizer" / "state.pt", weights_only=True) for run in (whole, resumed))
    assert flat(a) == flat(b)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_frozen_parts_can_join(dtype, train):
    """The discriminator alone at first, or the decoder alone, then everything."""
    judge = train("dc_ae", "judge", freeze_layers="all", dtype=dtype)
    both = train("dc_ae", load=str(judge), max_steps=4, dtype=dtype)
    assert "so their optimizer starts from scratch" in (both.parent / "log.txt").read_text()
    assert not same(weights(judge, AUTOENCODER), weights(both, AUTOENCODER))
    decoder = train("dc_ae", "decoder", freeze_layers="encoder", dtype=dtype)
    with pytest.raises(UserError, match="set optim.cls, optim.groups and freeze_layers"):
        train("dc_ae", load=str(decoder), max_steps=4, dtype=dtype)
    everything = train("dc_ae", load=str(decoder), max_steps=4, dtype=dtype, load_optimizer=False)
    before, after = weights(decoder, AUTOENCODER), weights(everything, AUTOENCODER)
    moved = {key.split(":")[1].split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"encoder", "decoder"}


def test_from_pictures_to_videos(train):
    """The kernels that pictures do not train start videos at zero; what pictures taught stays."""
    options = dict(image_steps=2, image_bucket_config={"32px_ar1:1": {1: (1.0, 2)}}, discriminator=None)
    pictures = weights(train("dc_ae", "pictures", max_steps=2, **options), AUTOENCODER)
    still = dict(optim={**OPTIMIZER, "lr": 1e-30}, image_lr=1e-3)  # the video stage leaves the weights as they begin
    videos = weights(train("dc_ae", "videos", max_steps=3, **{**options, **still}), AUTOENCODER)
    kernels = [key for key in pictures if pictures[key].ndim == 5 and pictures[key].shape[2] == 3]
    assert kernels
    for key in kernels:
        assert torch.allclose(videos[key][:, :, 1], pictures[key][:, :, 1], atol=1e-12), key
        assert videos[key][:, :, [0, 2]].abs().max() < 1e-12, key
        assert pictures[key][:, :, [0, 2]].abs().max() > 0, key


def test_perceptual_loss_trains(train, monkeypatch):
    monkeypatch.setattr(LPIPS.__init__, "__defaults__", ((2, 3, 4, 4, 4), False))
    section = dict(perceptual_loss_weight=0.5, kl_loss_weight=0.0, lpips=dict(random=True))
    run = train(
        "dc_ae", "perceptual", vae_loss_config=section, mixed_strategy="mixed_video_image", mixed_image_ratio=1.0
    )
    assert "image_perceptual=" in (run.parent / "log.txt").read_text()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dc_ae", dict(optim_discriminator=None), "optim_discriminator"),
        ("dc_ae", dict(optim_discriminator=dict(cls="HybridAdam")), "optim_discriminator"),
        ("dc_ae", dict(optim=None), "'optim' is missing"),
        ("dc_ae", dict(discriminator={**DISCRIMINATOR, "n_layers": 6}), r"n_layers=6.*lower n_layers"),
        ("dc_ae", dict(vae_loss_config=dict(perceptual_loss_weight=0.5)), "lpips.heads is not set"),
        ("dc_ae", dict(bucket_config={"32px_ar1:1": {4: (1.0, 1)}}), "use 1 or 8"),
        ("dc_ae", dict(bucket_config={"32px_ar1:1": {9: (1.0, 1)}}), "9 frames do not fit"),
        ("dc_ae", dict(bucket_config={"32px_ar1:1": {16: (1.0, 1)}}), "no bucket has a full batch"),
        ("dc_ae", dict(freeze_layers="all", discriminator=None), "nothing to train"),
        ("dc_ae", dict(freeze_layers="encoders"), "fits no parameter"),
        ("dc_ae", dict(freeze_layers="decoder"), "last layer"),
        ("dc_ae", dict(mixed_image_ratio=2.0), "mixed_image_ratio=2.0: must be at least 0 and at most 1"),
        ("dc_ae", dict(accumulation_steps=0), "accumulation_steps=0: must be at least 1"),
        ("dc_ae", dict(num_workers=-1), "num_workers=-1: must be at least 0"),
        ("dc_ae", dict(gen_loss_config=dict(gen_start=-1)), "gen_start"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(kind, changes, message, train, tmp_path):
    with pytest.raises(UserError, match=message):
        train(kind, "bad", **changes)
    assert not (tmp_path / "outputs").exists()


def test_mixed_lengths():
    clip = torch.zeros(1, 3, 17, 4, 4)
    generator = torch.Generator().manual_seed(0)

    def draw(mixer, count=2000):
        return [mixer(clip, generator).shape[2] for _ in range(count)]

    assert set(draw(LengthMixer(), 3)) == {17}
    share = np.mean(np.array(draw(LengthMixer("mixed_video_image", 0.2))) == 1)
    assert share == pytest.approx(0.2, abs=0.03)
    mixer = LengthMixer("mixed_video_image", 0.2)
    assert [mixer.on_rank(rank, 4).probability for rank in range(4)] == pytest.approx([0, *[0.2 * 4 / 3] * 3])
    lengths, counts = np.unique(draw(LengthMixer("mixed_video_random")), return_counts=True)
    assert lengths.tolist() == [1, 5, 9, 13, 17]
    assert counts.min() > 300
    assert LengthMixer("mixed_video_random", spec=LatentSpec((4, 32, 32), False)).lengths(17) == [1, 8, 12, 16]
    assert LengthMixer("mixed_video_random", spec=LatentSpec((1, 8, 8), False)).lengths(4) == [1, 2, 3, 4]
