"""Fixtures that several folders of tests share."""

import ctypes
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import INFERENCE, files, load_main
from tests.helpers.seeds import drawing, seed

ROOT = Path(__file__).parents[1]


# Files of one name run on one worker, one after the other: they share a server, or a process that forks others.
TOGETHER = {
    "server": ("tests/ui/", "tests/integration/test_serving.py"),
    "processes": (
        "tests/parallel/",
        "tests/integration/test_serving_kills.py",
        "tests/integration/test_training_kill.py",
        "tests/integration/test_two_at_once.py",
        "tests/unit/utils/test_logging.py",
    ),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``pytest -n``, a file runs on one worker, so that nothing of it is made twice; in the order of their names,
    which puts long ones first and many short ones last."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            for name, places in TOGETHER.items():
                if nodeid.startswith(places):
                    return name
            return nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return GroupScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Tests and what they import stay: looking through all of it for garbage at every few thousand takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it again and again for garbage takes longer than many a test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """A test draws the same random numbers in every run, whatever ran before it."""
    seed(request.node.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """So does a fixture that tests share, whichever asks for it first; what that test draws itself stays the same."""
    if fixturedef.scope == "function":
        return (yield)
    with drawing(f"{fixturedef.baseid}::{fixturedef.argname}[{request.param_index}]"):
        return (yield)


@pytest.fixture
def fill_memory() -> Iterator[Callable[[int], None]]:
    """``fill_memory(byte)``: from now on, what C code gets from malloc and does not write holds that byte (glibc)."""
    library, perturb = ctypes.CDLL(None), -6  # M_PERTURB of malloc.h
    if not hasattr(library, "mallopt"):
        pytest.skip("fills memory by glibc's mallopt")
    yield lambda byte: library.mallopt(perturb, byte)
    library.mallopt(perturb, 0)


def text_encoder(name: str, width_key: str) -> tuple[str, int]:
    """Folder of a shipped small text encoder, and the width of its output."""
    folder = ROOT / "assets" / "demo" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not at hand")
    return str(folder), json.loads((folder / "config.json").read_text())[width_key]


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory):
    """A service of the demo model, and the address where it answers, with a page."""
    pytest.importorskip("gradio", reason="needs requirements-serve.txt")
    from tests.helpers.serving import listening, served, working

    config = str(ROOT / "configs" / "diffusion" / "inference" / "demo.py")
    service = served(config, tmp_path_factory.mktemp("demo_server"))
    with working(service), listening(service) as address:
        yield service, address


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """See :func:`tiny_inference_config`. Do not change it: ``{**tiny_config, ...}``."""
    return tiny_inference_config()


def tiny_inference_config() -> dict[str, Any]:
    """Content of an inference config whose models are random and tiny: 9 frames of 32 x 32 in 4 steps."""
    t5, t5_width = text_encoder("google/t5-demo", "d_model")
    clip, clip_width = text_encoder("openai/clip-demo", "hidden_size")
    return {
        "device": "cpu",
        "dtype": "fp32",
        "seed": 1,
        "batch_size": 1,
        "fps_save": 8,
        "dataset": {"type": "text"},
        "sampling_option": {
            "resolution": "32px",
            "aspect_ratio": "1:1",
            "num_frames": 9,
            "num_steps": 4,
            "guidance": 5.0,
            "guidance_img": 2.0,
            "is_causal_vae": True,
            "temporal_reduction": 4,
        },
        "model": {
            "type": "flux",
            "in_channels": 16,
            "vec_in_dim": clip_width,
            "context_in_dim": t5_width,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": False,
            "cond_embed": True,
            "fused_qkv": False,
            "use_liger_rope": True,
        },
        "ae": {
            "type": "hunyuan_vae",
            "latent_channels": 4,
            "block_out_channels": [4, 4, 8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        "t5": {"type": "text_embedder", "from_pretrained": t5, "max_length": 16},
        "clip": {"type": "text_embedder", "from_pretrained": clip, "max_length": 77},
    }


@pytest.fixture
def tiny_config_file(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """The same as a config file, alone in its folder."""
    folder = tmp_path / "config"
    folder.mkdir()
    path = folder / "tiny.py"
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in tiny_config.items()))
    return path


@pytest.fixture(scope="session")
def inference_main():
    """``main`` of the inference script."""
    return load_main(INFERENCE)


@pytest.fixture
def run_tiny(inference_main, tiny_config_file, tmp_path, monkeypatch):
    """Run one command line of the tiny config in an empty folder; returns the paths of the files it left there."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str) -> list[str]:
        inference_main([str(tiny_config_file), *map(str, words)])
        return files(work)

    return run
