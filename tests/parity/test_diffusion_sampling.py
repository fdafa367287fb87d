"""Whole sampling runs against the reference: trajectories, final latents, decoded pixels."""

import pytest
import torch
from torch.testing import assert_close

from opensora.diffusion.conditions import build_condition, get_spans, restore_references
from opensora.diffusion.flow import get_schedule
from opensora.diffusion.guidance import Guidance
from opensora.diffusion.latents import pack, prepare_ids, unpack
from opensora.diffusion.solvers import euler, make_steps, solve
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, distilled_velocity, guided_velocity
from opensora.registry import MODELS, build_module

GUIDED = [
    "sampling_t2v_4step",
    "sampling_i2v_head_4step",
    "sampling_i2v_head_14step_osci",
    "sampling_i2v_loop_12step_osci",
    "sampling_t2v_b2_fused",
    "sampling_highcomp_t2v_4step",
]


def assert_near(actual, expected, tolerance=1e-4):
    """Within ``tolerance`` of the reference's largest value."""
    assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def load_mmdit(golden, meta):
    weights = golden(meta["mmdit_weights"].removesuffix(".safetensors")).weights
    config = {key: value for key, value in meta["mmdit_config"].items() if key != "from_pretrained"}
    model = build_module({"type": "flux", **config}, MODELS, device_map="cpu", torch_dtype=torch.float32)
    model.load_state_dict(weights)
    return model.eval()


def sampler_inputs(case):
    """Latent size, schedule, ids and packed noise, made by our code from the options of the case."""
    option, patch = case.meta["option"], case.meta["patch_size"]
    noise = case.inputs["noise"]
    size = tuple(noise.shape[2:])
    tokens = size[1] * size[2] // patch**2
    times = get_schedule(option["num_steps"], tokens, size[0], option["shift"], option["flow_shift"])
    assert_close(torch.tensor(times), case.inputs["timesteps"].float(), atol=1e-6, rtol=0)
    ids = prepare_ids(len(noise), size, patch, case.inputs["txt"].shape[1])
    return noise, size, times, ids


@pytest.mark.parametrize("name", GUIDED)
def test_guided(golden, name):
    case = golden(name)
    option, patch, cond_type = case.meta["option"], case.meta["patch_size"], case.meta["cond_type"]
    noise, size, times, (img_ids, txt_ids) = sampler_inputs(case)
    batch = len(noise)
    refs = [[case.inputs[key] for key in ("ref0", "ref1") if key in case.inputs] or None] * batch
    cond = pack(build_condition(noise, cond_type, refs, option["is_causal_vae"]), patch)
    assert_close(cond, case.inputs["cond_step0"][:batch])
    txt, vec = case.inputs["txt"].split(batch), case.inputs["y_vec"].split(batch)
    is_image = bool(get_spans(cond_type))
    guidance = Guidance(
        option["guidance"],
        option["guidance_img"],
        option["text_osci"],
        option["image_osci"],
        option["scale_temporal_osci"] and is_image,
    )
    trajectory = [pack(noise, patch)]
    denoiser = Denoiser(load_mmdit(golden, case.meta), img_ids, txt_ids, cond)
    texts = [TextEmbeddings(*each) for each in zip(txt, vec)][:2]
    velocity = guided_velocity(denoiser, *texts, guidance, len(times) - 1, size[0], has_image=is_image)
    x = solve(
        euler,
        velocity,
        trajectory[0],
        make_steps(times),
        on_step=lambda step, total, tokens: trajectory.append(tokens),
    )
    for step, expected in enumerate(case.outputs["traj_img_in"]):
        assert_near(trajectory[step], expected)
    final = restore_references(unpack(x, size, patch), cond_type, refs)
    assert_near(final, case.outputs["final_latent"])


def test_distilled(golden):
    case = golden("sampling_distill_4step")
    noise, size, times, (img_ids, txt_ids) = sampler_inputs(case)
    text = TextEmbeddings(case.inputs["txt"], case.inputs["y_vec"])
    denoiser = Denoiser(load_mmdit(golden, case.meta), img_ids, txt_ids)
    velocity = distilled_velocity(denoiser, text, case.meta["option"]["guidance"])
    x = solve(euler, velocity, pack(noise), make_steps(times))
    assert_near(unpack(x, size), case.outputs["final_latent"])


@pytest.mark.parametrize("name", [name for name in GUIDED if "b2" not in name and "highcomp" not in name])
def test_decoded_by_the_causal_vae(golden, name):
    case, vae = golden(name), golden("hunyuan_vae")
    config = {**vae.meta["config"]}
    model = build_module({"type": "hunyuan_vae", **config}, MODELS)
    model.load_state_dict(vae.weights)
    with torch.no_grad():
        decoded = model.eval().decode(case.outputs["final_latent"])[:, :, : case.meta["option"]["num_frames"]]
    assert_near(decoded, case.outputs["decoded"])
