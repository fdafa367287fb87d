"""Every registered autoencoder keeps the contract, and nothing in the package asks for more than the contract says."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from opensora.models.autoencoder import Autoencoder, LatentSpec, as_autoencoder, check_buckets
from opensora.models.kinds import kind_of, known_kinds
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[3]
STAGES = {"width_list": [8, 32, 32], "depth_list": [1, 1, 1], "block_type": ["ResBlock", "EViTS5_GLU", "EViTS5_GLU"]}
CODERS = {
    "encoder": {**STAGES, "temporal_downsample": [True, True, False]},
    "decoder": {**STAGES, "temporal_upsample": [True, True, False]},
}
# of each: small sizes, a scaling, and tiles of 16 pixels and 8 frames where there are tiles
SMALL = {
    "hunyuan_vae": dict(
        latent_channels=4, block_out_channels=[4, 4, 8, 8], layers_per_block=1, norm_num_groups=2,
        scale_factor=[0.5, 1.0, 2.0, 4.0], shift_factor=0.25, sample_size=16, sample_tsize=8,
    ),
    "dc_ae": dict(
        from_scratch=True, latent_channels=4, **CODERS, scaling_factor=0.5, spatial_tile_size=16, temporal_tile_size=8
    ),
    "autoencoder_2d": dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, z_channels=4),
}  # fmt: skip
AUTOENCODERS = [name for name, kind in known_kinds() if kind.section == "ae"]
LENGTHS = (1, 2, 3, 4, 5, 8, 9, 12, 13)


@pytest.fixture(scope="module", params=AUTOENCODERS)
def built(request):
    """Type and model of each autoencoder, with weights that matter everywhere."""
    torch.manual_seed(0)
    model = build_module({"type": request.param, **SMALL[request.param]}, MODELS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return request.param, model


@pytest.fixture
def model(built):
    return built[1]


def clip(frames, height=16, width=24, batch=2):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def seeded(number=3):
    return torch.Generator().manual_seed(number)


def test_the_test_knows_every_autoencoder():
    assert set(AUTOENCODERS) == set(SMALL) == {"hunyuan_vae", "dc_ae", "autoencoder_2d"}


def test_it_is_one(built):
    name, model = built
    assert as_autoencoder(model) is model
    bare = build_module({"type": name, **SMALL[name]}, MODELS, device_map="meta")
    assert LatentSpec.of(bare) == LatentSpec.of(model), "sizes are known without weights"
    with pytest.raises(UserError, match="Linear is no autoencoder"):
        as_autoencoder(nn.Linear(1, 1))


def test_a_class_that_lacks_something_cannot_be_built():
    class Half(nn.Module, Autoencoder):
        compression, is_causal = (1, 8, 8), False

    with pytest.raises(TypeError, match="decode.*encode_stored.*get_last_layer.*latent_channels"):
        Half()


def test_what_are_no_pixels_and_no_latents_is_refused_in_words(model):
    z = torch.zeros(1, model.latent_channels, 2, 4, 4)
    for wrong in (z[0, 0, 0], z[:, :0], z[:, :, :0], z.int(), z.numpy(), None):
        with pytest.raises(UserError, match="^latents "):
            model.decode(wrong)
    for pixels in (clip(1)[0, 0, 0], clip(1)[:, :2], clip(1).int(), None):
        with pytest.raises(UserError, match="^pixels "):
            model.encode(pixels)
    for size in ((0, 32, 32), (5, 32), (5, 32, -32), (5, 32, 32.5)):
        with pytest.raises(UserError, match="a clip of size"):
            model.get_latent_size(size)


@pytest.mark.parametrize("frames", LENGTHS)
def test_shapes_and_lengths(model, frames):
    x = clip(frames)
    nearest = model.nearest_frames(frames)
    if frames not in nearest:
        assert len(nearest) == 2
        assert nearest[0] < frames < nearest[1]
        with pytest.raises(UserError, match=f"use {nearest[0]} or {nearest[1]}"):
            model.encode(x)
        assert not any(model.nearest_frames(n) == (n,) for n in range(nearest[0] + 1, nearest[1]))
        return
    assert nearest == (frames,)
    z = model.encode(x)
    assert z.shape == (2, model.latent_channels, *model.get_latent_size(x.shape[2:]))
    out = model.decode(z)
    assert out.shape[-2:] == x.shape[-2:]
    assert (out.shape[2] == frames) == model.keeps_length(frames)
    whole, posterior, latents = model(x, generator=seeded())
    assert whole.shape == out.shape
    assert torch.equal(latents, model.encode(x, generator=seeded()))
    assert posterior is None or posterior.mean.shape == z.shape


def test_bucket_lengths(model):
    check_buckets({"64px": {n: None for n in LENGTHS if model.nearest_frames(n) == (n,)}}, model)
    wrong = next((n for n in LENGTHS if model.nearest_frames(n) != (n,)), None)
    if wrong is None:
        assert model.compression[0] == 1
        return
    near = " or ".join(map(str, model.nearest_frames(wrong)))
    with pytest.raises(UserError, match=rf"bucket_config\['64px'\]: {wrong} frames .*; use {near}$"):
        check_buckets({"64px": {wrong: None}}, model)


@pytest.mark.parametrize("sample", [True, False])
def test_what_is_stored_gives_the_same_latents(built, sample):
    name, model = built
    x = clip(9 if model.is_causal else 8)
    stored = model.encode_stored(x)
    assert torch.equal(stored, model.encode_stored(x)), "nothing random is stored"
    expected = model.encode(x, sample, seeded())
    assert torch.equal(model.from_stored(stored, seeded(), sample), expected)
    bare = build_module({"type": name, **SMALL[name]}, MODELS, device_map="meta")
    assert torch.equal(bare.from_stored(stored, seeded(), sample), expected), "weights are not needed"


def test_keys_that_only_scale_do_not_change_what_is_stored(built):
    name, model = built
    x = clip(1)
    changes = dict.fromkeys(model.scaling_keys, 3.0)
    other = build_module({"type": name, **SMALL[name], **changes}, MODELS).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.encode_stored(x), model.encode_stored(x))
    if changes:
        assert not torch.equal(other.encode(x, False), model.encode(x, False))


def test_scaling_and_its_text(built):
    name, model = built
    raw = torch.randn(2, model.latent_channels, 1, 2, 3)
    torch.testing.assert_close(model.denormalize(model.normalize(raw)), raw)

    class Moments:
        mean = torch.full((4,), 0.5)
        std = torch.tensor([0.5, 1.0, 2.0, 4.0])
        overall = (0.5, 2.0)

    scope: dict = {}
    exec(f"section = dict({model.scale_text(Moments())})", scope)
    scaled = build_module({"type": name, **SMALL[name], **scope["section"]}, MODELS, device_map="meta")
    unit = scaled.normalize(Moments.mean.reshape(1, 4, 1, 1, 1) + Moments.std.reshape(1, 4, 1, 1, 1))
    if name == "hunyuan_vae":
        torch.testing.assert_close(unit, torch.ones_like(unit))
    else:  # one number for all channels
        torch.testing.assert_close(unit.flatten().diff(), torch.tensor([0.25, 0.5, 1.0]), atol=1e-4, rtol=0)


def type_of(name):
    return type(build_module({"type": name, **SMALL[name]}, MODELS, device_map="meta"))


def test_tiles_for_a_while(model):
    frames = 17 if model.is_causal else 16
    x = clip(frames, 32, 32, batch=1)
    z = model.encode(x, False)
    whole, before = model.decode(z), model.tiling
    with model.tiled():
        tiled = model.decode(z)
        assert tiled.shape == whole.shape
        assert torch.equal(tiled, whole) == (model.tiling is None), "tiles show at their seams"
    assert model.tiling is before
    assert torch.equal(model.decode(z), whole)
    with pytest.raises(RuntimeError, match="in the block"), model.tiled():
        raise RuntimeError("in the block")
    assert model.tiling is before


def test_inflation_keeps_single_frames(built):
    name, plain = built
    model = build_module({"type": name, **SMALL[name]}, MODELS).eval().double()
    model.load_state_dict(plain.state_dict())
    x = clip(1).double()
    before, old = model(x, sample_posterior=False)[0], {k: v.clone() for k, v in model.state_dict().items()}
    changed = model.inflate_from_images()
    torch.testing.assert_close(model(x, sample_posterior=False)[0], before, atol=1e-10, rtol=1e-10)
    assert changed == any(not torch.equal(v, old[k]) for k, v in model.state_dict().items())
    assert changed == (model.compression[0] > 1), "only those with kernels in time have something to inflate"


def test_gradient_checkpointing(built):
    name, plain = built
    model = build_module({"type": name, **SMALL[name]}, MODELS).double().train()
    model.load_state_dict(plain.state_dict())
    x = clip(9 if model.is_causal else 8, batch=1).double()
    found = []
    for enabled, last_layer in ((False, True), (True, True), (True, False), (False, True)):
        if enabled and not model.supports_grad_checkpoint:
            continue
        model.set_grad_checkpoint(enabled, last_layer)
        model.zero_grad()
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=packed: kept.append(t.numel()) or t, lambda t: t):
            loss = model(x, generator=seeded())[0].square().mean()
        loss.backward()
        found.append((sum(packed), model.get_last_layer().grad.clone()))
    for _, gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0][1], atol=1e-12, rtol=1e-9)
    if model.supports_grad_checkpoint:
        assert found[1][0] < found[0][0], "less is kept"
        assert found[0][0] == found[3][0]


def test_kinds_are_declared_beside_their_models():
    """A weight file is told by its tensors; the table of them is nowhere written down."""
    assert {name for name, _ in known_kinds()} == {"flux", *AUTOENCODERS}
    for name, kind in known_kinds():
        assert kind_of(MODELS.resolve(name)) is kind
    source = inspect.getsource(inspect.getmodule(known_kinds))
    assert not [name for name in AUTOENCODERS if name in source.replace('"', "'").split("'")]


def asked_of_autoencoders():
    """Names by which an autoencoder could be told from another: those of the contract and of every shipped class."""
    names = {name for name in vars(Autoencoder) | Autoencoder.__annotations__ if not name.startswith("_")}
    for name in AUTOENCODERS:
        names |= {key for key in vars(type_of(name)) if not key.startswith("_")}
    return names


def probes(path, members, classes):
    """(line, what) of every probe of an autoencoder and every branch on its type or class in a file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            kind, (subject, asked) = node.func.id, node.args[:2]
            if kind in ("hasattr", "getattr") and isinstance(asked, ast.Constant) and asked.value in members:
                yield node.lineno, f"{kind} {asked.value}"
            if kind in ("hasattr", "getattr") and isinstance(subject, ast.Name) and subject.id in ("ae", "autoencoder"):
                yield node.lineno, f"{kind} of {subject.id}"
            if kind == "isinstance" and classes & {n.id for n in ast.walk(asked) if isinstance(n, ast.Name)}:
                yield node.lineno, "isinstance"
        if isinstance(node, ast.Compare | ast.MatchValue):
            strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if strings & set(AUTOENCODERS):
                yield node.lineno, f"compared with {strings & set(AUTOENCODERS)}"


def test_nothing_probes_or_branches_on_autoencoders():
    members, classes = asked_of_autoencoders(), {type_of(name).__name__ for name in AUTOENCODERS}
    files = [path for folder in ("opensora", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [(path.relative_to(ROOT), *probe) for path in files for probe in probes(path, members, classes)]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        'hasattr(model, "encode_moments")',
        'getattr(ae, "anything", None)',
        "isinstance(model, DCAE)",
        'section["type"] != "dc_ae"',
        'cfg.ae.type in ("hunyuan_vae", "other")',
    ],
)
def test_a_probe_would_be_found(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert list(probes(tmp_path / "a.py", asked_of_autoencoders(), {"DCAE"}))
