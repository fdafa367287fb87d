"""The nodes of ComfyUI, by its contract: registered, checked and executed as it does; the demo goes through them."""

import copy
import json
import re
import sys
import tomllib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opensora import VideoPipeline
from opensora.config.choices import CONDITIONS
from tests.conftest import ROOT
from tests.helpers.comfy import Comfy, Executor, Interrupted, SaveAnimatedWEBP, all_inputs, as_graph, load_package

FOLDER = ROOT / "comfyui"
WORKFLOW = json.loads((FOLDER / "example_workflows" / "text_to_video.json").read_text())
TYPES = {"IMAGE", "INT", "FLOAT", "STRING", "BOOLEAN", "OPENSORA_PIPELINE", "OPENSORA_PROMPT", "OPENSORA_LATENTS"}
LOADER, SAMPLER = 1, 3  # numbers in the workflow


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    (tmp_path / "loras").mkdir()
    made = Comfy(tmp_path / "loras")
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(SaveAnimatedWEBP, "got", [])
    return made


@pytest.fixture
def package(comfy):
    loaded = load_package(FOLDER)
    yield loaded
    for name in [name for name in sys.modules if name.startswith(loaded.__name__)]:
        del sys.modules[name]


@pytest.fixture
def classes(package):
    return {**package.NODE_CLASS_MAPPINGS, "SaveAnimatedWEBP": SaveAnimatedWEBP}


@pytest.fixture
def graph(classes):
    made = as_graph(WORKFLOW, classes)
    made[LOADER]["inputs"]["device"] = "cpu"
    made[SAMPLER]["inputs"] |= {"steps": 2, "num_frames": 5}
    return made


def test_contract(package):
    assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in package.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY == "Open-Sora"
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert set(node.RETURN_TYPES) <= TYPES
        for name, kind in all_inputs(node).items():
            assert isinstance(kind[0], list) or kind[0] in TYPES, name
            default = kind[1].get("default") if len(kind) > 1 else None
            assert default is None or not isinstance(kind[0], list) or default in kind[0]


def test_registry_finds_what_it_wants():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert re.fullmatch(r"[a-z][a-z0-9.-]*", project["project"]["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["urls"]["Repository"].startswith("https://")
    assert {"PublisherId", "DisplayName", "Icon"} <= project["tool"]["comfy"].keys()


def test_the_example_makes_the_frames_of_the_pipeline(comfy, classes, graph):
    executor = Executor(classes)
    executor.execute(graph)
    ((images, fps),) = SaveAnimatedWEBP.got
    assert (images.shape, images.dtype, fps) == ((5, 64, 64, 3), torch.float32, 8.0)
    pipe = VideoPipeline.from_pretrained("demo", device="cpu")
    expected = pipe("a red circle moving right", seed=42, num_frames=5, num_steps=2).frames[0]
    np.testing.assert_array_equal((images * 255).round().byte().numpy(), expected)
    assert comfy.shown[:2] == [(1, 2), (2, 2)]
    assert comfy.shown[-1] == (5, 5), "frames as they are decoded"
    assert comfy.freed

    # with an adapter after it the model is not loaded again, and without it the frames are the first ones
    generator = torch.Generator().manual_seed(0)
    wide, narrow = pipe.models["model"].img_in.weight.shape
    state = {
        "diffusion_model.img_in.lora_A.weight": torch.randn(2, narrow, generator=generator),
        "diffusion_model.img_in.lora_B.weight": torch.randn(wide, 2, generator=generator),
    }
    save_file(state, comfy.loras / "style.safetensors")
    with_lora = copy.deepcopy(graph)
    lora = {"pipeline": (LOADER, 0), "lora": "style.safetensors", "strength": 0.5}
    with_lora[6] = {"class_type": "OpenSoraLora", "inputs": lora}
    with_lora[SAMPLER]["inputs"]["pipeline"] = (6, 0)
    executor.execute(with_lora)
    assert executor.ran == ["OpenSoraLora", "OpenSoraSampler", "OpenSoraDecode", "SaveAnimatedWEBP"]
    pipe.load_lora(comfy.loras / "style.safetensors", 0.5)
    expected = pipe("a red circle moving right", seed=42, num_frames=5, num_steps=2).frames[0]
    np.testing.assert_array_equal((SaveAnimatedWEBP.got[1][0] * 255).round().byte().numpy(), expected)
    executor.execute(graph)
    assert executor.ran == ["OpenSoraSampler", "OpenSoraDecode", "SaveAnimatedWEBP"]
    assert torch.equal(SaveAnimatedWEBP.got[2][0], images)


@pytest.mark.parametrize(
    ("given", "condition", "shapes"),
    [
        ({}, "t2v", []),
        ({"first_frame": 2}, "i2v_head", [(1, 4, 6, 3)]),
        ({"last_frame": 1}, "i2v_tail", [(1, 4, 6, 3)]),
        ({"first_frame": 1, "last_frame": 1}, "i2v_loop", [(1, 4, 6, 3)] * 2),
        ({"clip": 9}, "v2v_head", [(9, 4, 6, 3)]),
    ],
)
def test_pictures_say_what_is_fixed(package, given, condition, shapes):
    node = package.NODE_CLASS_MAPPINGS["OpenSoraPrompt"]()
    images = {name: torch.full((count, 4, 6, 4), 0.5) for name, count in given.items()}
    (request,) = node.describe("a", "", "auto", 0.0, **images)
    assert (request.cond_type, [pixels.shape for pixels in request.references]) == (condition, shapes)
    assert all(pixels.dtype == np.uint8 and (pixels == 128).all() for pixels in request.references)
    assert node.describe("a", "", "v2v_tail", 0.0, **images)[0].cond_type == "v2v_tail"
    if "clip" not in given and given:
        with pytest.raises(ValueError, match="give a clip, or a first and a last frame, not both"):
            node.describe("a", "", "auto", 0.0, **images, clip=torch.zeros(1, 4, 6, 3))


def test_conditions_are_those_of_opensora(package):
    kinds = all_inputs(package.NODE_CLASS_MAPPINGS["OpenSoraPrompt"])["condition"][0]
    assert kinds == [
        "auto",
        *(name for name in CONDITIONS.places if name not in ("frames", "region")),
    ]  # which say where


def test_cancel_ends_at_the_next_step(comfy, classes, graph):
    comfy.interrupt_at = 1
    with pytest.raises(Interrupted):
        Executor(classes).execute(graph)
    assert comfy.shown == [(1, 2)]
    assert SaveAnimatedWEBP.got == []
