"""The small pieces of sampling and training against the reference tensors."""

import pytest
import torch
from torch.testing import assert_close

from opensora.diffusion import flow
from opensora.diffusion.conditions import CONDITIONS, build_condition, get_spans
from opensora.diffusion.latents import get_noise, pack, prepare_ids, unpack

SHIFT_SIZES = ((256, 33), (2304, 33))  # tokens per latent frame, latent frames


def test_schedules(golden):
    _, _, outputs, _, meta = golden("math")
    for name, arguments in meta["schedules"].items():
        arguments = dict(arguments)
        times = flow.get_schedule(flow_shift=arguments.pop("shift_alpha"), **arguments)
        assert_close(torch.tensor(times), outputs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_pack_and_back(golden, patch_size):
    _, inputs, outputs, _, _ = golden("math")
    tokens = pack(inputs["z"], patch_size)
    assert_close(tokens, outputs[f"pack_ps{patch_size}"])
    assert_close(unpack(tokens, inputs["z"].shape[2:], patch_size), inputs["z"])


def test_noise_of_a_single_sample(golden):
    outputs = golden("math").outputs
    assert_close(get_noise([42], 4, (3, 8, 12)), outputs["noise_seed42_1x4x3_64x96"], rtol=0, atol=0)


@pytest.mark.parametrize("vae", ["causal", "plain"])
@pytest.mark.parametrize("cond_type", [name for name in CONDITIONS if name == "t2v" or get_spans(name)])
def test_conditions(golden, cond_type, vae):
    _, inputs, outputs, _, _ = golden("math")
    refs = [[inputs["cond_ref0"], inputs["cond_ref1"]]]
    cond = build_condition(torch.zeros(1, 4, 20, 4, 6), cond_type, refs, vae == "causal")
    assert_close(cond[0, 0, :, 0, 0], outputs[f"cond_{cond_type}_{vae}_mask_t"])
    assert_close(cond[0, 1:].sum((0, 2, 3)), outputs[f"cond_{cond_type}_{vae}_ref_sum_t"], atol=1e-4, rtol=1e-5)


def test_training_path(golden):
    _, inputs, outputs, _, _ = golden("math")
    x_0, noise, t = inputs["train_x0"], inputs["train_x1"], inputs["train_t"]
    assert_close(flow.interpolate(x_0, noise, t), outputs["train_x_t"], atol=1e-6, rtol=1e-5)
    assert_close(flow.velocity(x_0, noise), outputs["train_target"], atol=1e-6, rtol=1e-5)


def test_time_shift(golden):
    _, inputs, outputs, _, _ = golden("math")
    shifts = [flow.time_shift(flow.shift_alpha(*size), inputs["train_t"]) for size in SHIFT_SIZES]
    assert_close(torch.stack(shifts), outputs["time_shift"], atol=1e-6, rtol=1e-5)


def test_losses(golden):
    _, inputs, outputs, _, _ = golden("math")
    pred, target, masks = inputs["loss_pred"], inputs["loss_v"], inputs["loss_masks"]
    assert_close(flow.flow_matching_loss(pred, target), outputs["batch_loss"])
    keep = flow.unconditioned_tokens(masks, tokens_per_frame=4)
    assert_close(flow.flow_matching_loss(pred, target, keep), outputs["batch_loss_masked"])


@pytest.mark.parametrize("name", ["sampling_t2v_4step", "sampling_highcomp_t2v_4step"])
def test_inputs_of_the_sampler(golden, name):
    inputs = golden(name).inputs
    batch, channels, *size = inputs["noise"].shape
    patch_size = 1 if "highcomp" in name else 2
    assert_close(get_noise([48 if patch_size == 1 else 42], channels, tuple(size)), inputs["noise"], rtol=0, atol=0)
    img_ids, txt_ids = prepare_ids(3 * batch, tuple(size), patch_size, inputs["txt"].shape[1])
    assert_close(img_ids, inputs["img_ids"].float())
    assert_close(txt_ids, inputs["txt_ids"].float())
