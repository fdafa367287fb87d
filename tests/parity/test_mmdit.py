"""The MMDiT against reference tensors of the original model, and against diffusers' Flux."""

import pytest
import torch
from torch.nn import functional as F

from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.attention import (
    JointAttention,
    Rotary,
    rotary_table,
    rotate_half_split,
    rotate_interleaved,
)
from opensora.models.mmdit.layers import timestep_embedding

FILES = ["mmdit_video", "mmdit_flux", "mmdit_video_fused", "mmdit_highcomp"]
CALL = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond", "guidance")
TOLERANCE = 1e-4


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def load(file):
    fields = MMDiTConfig.__dataclass_fields__
    config = MMDiTConfig.from_dict({key: value for key, value in file.meta["config"].items() if key in fields})
    model = MMDiTModel(config)
    model.load_state_dict(file.weights)
    return model, {key: value for key, value in file.inputs.items() if key in CALL}


@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients(golden, name):
    file = golden(name)
    model, inputs = load(file)
    out = model(**inputs)
    close(out, file.outputs["out"])
    loss = F.mse_loss(out, file.inputs["target"])
    close(loss, file.outputs["mse_loss"])
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert file.grads
    for key, expected in file.grads.items():
        torch.testing.assert_close(gradients[key], expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    close(norm, file.outputs["grad_norm"])


@pytest.mark.parametrize("name", FILES)
def test_parts(golden, name):
    file = golden(name)
    model, inputs = load(file)
    with torch.no_grad():
        img, txt, vec, rope = model.prepare(*(inputs.get(key) for key in CALL))
        close(img, file.outputs["prep_img"])
        close(txt, file.outputs["prep_txt"])
        close(vec, file.outputs["prep_vec"])
        img, txt = model.double_blocks[0](img, txt, vec, rope)
        close(img, file.outputs["double0_img"])
        close(txt, file.outputs["double0_txt"])
        single = model.single_blocks[0](torch.cat((txt, img), dim=1), vec, rope)
        close(single, file.outputs["single0_after_double0"])
    cos, sin = (half.squeeze(2) for half in rope)
    if model.config.use_liger_rope:
        close(cos.repeat(1, 1, 2), file.outputs["pe_cos"])
        close(sin.repeat(1, 1, 2), file.outputs["pe_sin"])
    else:
        matrix = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)).unsqueeze(1)
        close(matrix, file.outputs["pe"])


@pytest.mark.parametrize("name", FILES)
def test_bfloat16(golden, name):
    file = golden(name)
    model, inputs = load(file)
    for key in {"img", "txt", "y_vec", "cond"} & inputs.keys():  # a rounded time would be another time
        inputs[key] = inputs[key].bfloat16()
    with torch.no_grad():
        close(model.bfloat16()(**inputs), file.outputs["out"], 3e-2)


@pytest.mark.parametrize("name", ["mmdit_video", "mmdit_flux"])
def test_recomputing_activations_changes_nothing(golden, name):
    file = golden(name)
    model, inputs = load(file)
    model.grad_ckpt_settings = (1, 100)
    recomputed = []
    inner = model.recompute
    model.recompute = lambda block, *args: (recomputed.append(type(block).__name__), inner(block, *args))[1]
    F.mse_loss(model(**inputs), file.inputs["target"]).backward()
    assert recomputed == ["DoubleStreamBlock", "SingleStreamBlock", "SingleStreamBlock"]
    for key, expected in file.grads.items():
        gradient = model.get_parameter(key).grad
        torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def test_timestep_embedding(golden):
    file = golden("math")
    names = [name for name in file.outputs if name.startswith("timestep_embedding_")]
    assert names
    for name in names:
        close(timestep_embedding(file.inputs["t"], int(name.rsplit("_", 1)[1])), file.outputs[name])


def test_rope_and_attention(golden):
    file = golden("math")
    rope = file.meta["rope"]
    table = rotary_table(file.inputs["ids"], rope["axes_dim"], rope["theta"])
    close(table.cos.squeeze(2).repeat(1, 1, 2), file.outputs["pe_liger_cos"])
    close(table.sin.squeeze(2).repeat(1, 1, 2), file.outputs["pe_liger_sin"])
    q, k, v = (file.inputs[name].transpose(1, 2) for name in "qkv")
    for layout, rotate in (("flux", rotate_interleaved), ("liger", rotate_half_split)):
        close(rotate(q, table).transpose(1, 2), file.outputs[f"q_rope_{layout}"])
        close(rotate(k, table).transpose(1, 2), file.outputs[f"k_rope_{layout}"])
        for backend in ("sdpa", "math"):
            attention = JointAttention(backend, half_split=layout == "liger")
            close(attention(q, k, v, table), file.outputs[f"attention_{layout}"])


def test_layouts_are_a_permutation_of_each_other(golden):
    """Half-split rotation of permuted channels is the permuted interleaved rotation (how weights are converted)."""
    q = golden("math").inputs["q"].transpose(1, 2)
    angle = torch.linspace(0, 3, q.shape[1] * q.shape[-1] // 2).view(1, q.shape[1], 1, -1)
    rope = Rotary(angle.cos(), angle.sin())

    def permute(x):
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)

    close(rotate_half_split(permute(q), rope), permute(rotate_interleaved(q, rope)))
