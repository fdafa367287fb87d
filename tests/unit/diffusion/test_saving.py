"""A whole pipeline as a folder: the same frames from it by opensora, by diffusers, and by way of the hubs."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from opensora import VideoPipeline
from opensora.config import load_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.models.quantization.loading import kind_of_module
from opensora.utils import hub
from opensora.utils.errors import UserError

CALL = dict(seed=42, num_frames=5, num_steps=2)


def same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        before, after = module.state_dict(), theirs[name].state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items()), name


def same_frames(found, expected):
    """Weights are used where they lie in a file, and products of numbers at another alignment round differently (about
    1e-7): that turns a pixel in ten thousand that lies between two levels."""
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1
    assert np.mean(off > 0) < 1e-3


@pytest.fixture(scope="module")
def pipe():
    return VideoPipeline.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    return pipe.save_pretrained(tmp_path_factory.mktemp("saved") / "pipeline", name="org/demo", license="apache-2.0")


@pytest.fixture(scope="module")
def frames(pipe):
    return pipe("a red circle moving right", **CALL).frames[0]


def test_what_is_written(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "config.json", "model_index.json", "pipeline.py"} <= names
    assert {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"} <= names
    assert {"text_encoder/model.safetensors", "tokenizer/spiece.model", "tokenizer_2/vocab.json"} <= names
    assert not [name for name in names if Path(name).name.startswith(".")]
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "apache-2.0",
        "text-to-video",
        "opensora",
    )
    assert 'VideoPipeline.from_pretrained("org/demo")' in card.text
    assert '"num_steps": 50' in card.text
    assert "/root" not in (folder / "config.json").read_text()


def test_it_loads_as_it_was(pipe, folder, frames):
    again = VideoPipeline.from_pretrained(folder, device="cpu")
    same_weights(pipe.models, again.models)
    sampled = again("a red circle moving right", decode=False, **CALL)
    assert sampled.frames == []
    same_frames(again.decode(sampled.latents, sampled.plan)[0], frames)
    cfg = load_config(str(folder), InferenceOptions)
    assert (cfg.sampling_option.num_steps, cfg.fps_save, cfg.cond_type) == (50, 8, "t2v")


def test_a_folder_with_something_is_refused(pipe, folder, tmp_path):
    with pytest.raises(UserError, match="holds a pipeline; name another folder, or give overwrite=True"):
        pipe.save_pretrained(folder)
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match="exists and holds no pipeline"):
        pipe.save_pretrained(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_quantised_and_distilled_ones(tmp_path):
    pipe = VideoPipeline.from_pretrained(
        "demo_4step", device="cpu", **{"model.quantize": "int8", "t5.quantize": "int8"}
    )
    again = VideoPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "pipeline"), device="cpu")
    assert {name: kind_of_module(model) for name, model in again.models.items()} == {
        **{"model": "int8", "t5": "int8", "ae": None, "clip": None}
    }
    same_weights(pipe.models, again.models)
    assert again.distilled == pipe.distilled is not None
    assert again.cfg.sampling_option == pipe.cfg.sampling_option
    assert "license: other" in (tmp_path / "pipeline" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def test_diffusers_makes_the_same_frames(theirs, frames, pipe):
    assert type(theirs).__name__ == "OpenSoraPipeline"
    same_weights(pipe.models, theirs.video.models)
    assert theirs.transformer is theirs.video.models["model"]
    theirs.enable_model_cpu_offload(device="cpu")
    theirs.set_progress_bar_config(disable=True)
    assert (theirs.video.cfg.offload, theirs.device) == (True, torch.device("cpu"))
    steps = []
    made = theirs(
        "a red circle moving right",
        generator=torch.Generator().manual_seed(42),
        num_frames=5,
        num_inference_steps=2,
        callback_on_step_end=lambda pipe, step, left, given: steps.append((step, left, given["latents"].shape[0])),
    )
    same_frames(np.stack([np.asarray(frame) for frame in made.frames[0]]), frames)
    assert steps == [(0, 1, 1), (1, 0, 1)]


def test_diffusers_forms_of_frames(theirs, monkeypatch, folder):
    video = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)

    class Result:
        frames, latents = [video], torch.zeros(1)

    monkeypatch.setattr(theirs, "video", lambda prompt, **given: Result)
    (array,) = theirs("x", output_type="np").frames
    np.testing.assert_array_equal((array * 255).round(), video)
    (tensor,) = theirs("x", output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert theirs("x", output_type="latent").frames is Result.latents
    with pytest.raises(UserError, match="output_type='mp4': expected one of pil, np, pt, latent"):
        theirs("x", output_type="mp4")


def test_diffusers_has_the_tokenizers_too(theirs):
    for ours, own in ((theirs.tokenizer, theirs.text_encoder), (theirs.tokenizer_2, theirs.text_encoder_2)):
        assert type(ours) is type(own.tokenizer)
        assert ours("a red circle")["input_ids"] == own.tokenizer("a red circle")["input_ids"]


# ---------------------------------------------------------------------------------------------------------------- hubs


class FakeHub:
    """Repositories as folders, behind the functions that the hub's library has."""

    def __init__(self, root):
        self.root, self.asked = root, []

    def create_repo(self, repo_id, private=None, exist_ok=False, **_):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id, folder_path, commit_message, **_):
        self.asked.append(commit_message)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, ignore_patterns=None, cache_dir=None, local_files_only=False):
        self.asked.append((repo_id, local_files_only))
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404 {repo_id}\nmore")
        copy = self.root / "cache" / repo_id
        shutil.copytree(
            self.root / repo_id, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*(ignore_patterns or []))
        )
        return str(copy)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeHub(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_to_a_hub_and_back(pipe, fake):
    assert pipe.push_to_hub("org/video", license="mit", commit_message="first") == "https://hub/org/video"
    assert fake.asked == ["first"]
    assert 'from_pretrained("org/video")' in (fake.root / "org/video/README.md").read_text()
    same_weights(pipe.models, VideoPipeline.from_pretrained("org/video", device="cpu").models)
    assert not list((fake.root / "cache").rglob("*.py")), "code from a hub is not even downloaded"


def test_what_is_not_on_the_hub(pipe, fake):
    with pytest.raises(UserError, match=r"org/gone is neither a config here nor a shipped one.*404 org/gone\)$"):
        VideoPipeline.from_pretrained("org/gone")
    asked = len(fake.asked)
    for name, options in (("demo/265px", InferenceOptions), ("gone", InferenceOptions), ("org/gone", TrainOptions)):
        with pytest.raises(UserError, match="does not exist, and no shipped config has this name"):
            load_config(name, options)
    assert len(fake.asked) == asked
    with pytest.raises(UserError, match=r"'video' is no id of a repository"):
        pipe.push_to_hub("video")


@pytest.mark.parametrize("content", [{"imports": ["os"]}, {"_base_": "x.py"}])
def test_configs_of_a_hub_run_no_code(fake, content):
    file = fake.root / "org/bad/config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"model": {"type": "flux"}, **content}))
    with pytest.raises(UserError, match=rf"config\.json has {next(iter(content))}, which runs code; download it"):
        load_config("org/bad", InferenceOptions)
    file.write_text(json.dumps({"model": "no"}))
    with pytest.raises(UserError, match="is not that of a pipeline of opensora"):
        load_config("org/bad", InferenceOptions)


MODELSCOPE_FILES = {
    "__init__.py": "",
    "hub/__init__.py": "root = None\n",
    "hub/api.py": """
from pathlib import Path
from modelscope import hub
class HubApi:
    endpoint = "https://scope"
    def __init__(self, token=None): pass
    def create_repo(self, repo_id, *, token=None, visibility=None, exist_ok=False):
        (Path(hub.root) / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (Path(hub.root) / "visibility").write_text(str(visibility))
    def upload_folder(self, repo_id, folder_path=None, *, commit_message=None, token=None):
        import shutil
        shutil.copytree(folder_path, Path(hub.root) / repo_id, dirs_exist_ok=True)
    def get_model_files(self, model_id, revision=None, root=None, recursive=False):
        folder = Path(hub.root) / model_id
        return [{"Path": file.relative_to(folder).as_posix()} for file in folder.rglob("*")]
""",
    "hub/file_download.py": """
from pathlib import Path
from modelscope import hub
def model_file_download(model_id, file_path, revision=None, *, cache_dir=None, local_files_only=False):
    file = Path(hub.root) / model_id / file_path
    if local_files_only or not file.is_file():
        raise ValueError("no such file")
    return str(file)
""",
    "hub/snapshot_download.py": """
from pathlib import Path
from modelscope import hub
def snapshot_download(model_id=None, revision=None, cache_dir=None, *, local_files_only=False, allow_patterns=None,
                      ignore_patterns=None):
    folder = Path(hub.root) / model_id
    if local_files_only or not folder.is_dir():
        raise ValueError("no such model")
    return str(folder)
""",
}


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """A stand-in for the package modelscope (1.40), whose repositories are folders."""
    for name, text in MODELSCOPE_FILES.items():
        file = tmp_path / "packages" / "modelscope" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.chdir(tmp_path)
    import modelscope.hub

    modelscope.hub.root = str(tmp_path / "scope")
    yield tmp_path / "scope"
    for name in [name for name in sys.modules if name.split(".")[0] == "modelscope"]:
        del sys.modules[name]


def test_modelscope(pipe, modelscope):
    assert pipe.push_to_hub("modelscope:org/video", private=True) == "https://scope/models/org/video"
    assert (modelscope / "visibility").read_text() == "1"
    weights = "modelscope:org/video/transformer/diffusion_pytorch_model.safetensors"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(modelscope / "org/video" / part, modelscope / "org/t5", dirs_exist_ok=True)
    others = {"model.from_pretrained": weights, "t5.from_pretrained": "modelscope:org/t5"}
    again = VideoPipeline.from_pretrained("modelscope:org/video", device="cpu", **others)
    same_weights(pipe.models, again.models)
    with pytest.raises(UserError, match=r"modelscope:org/video/gone\.safetensors: the repository has no gone"):
        VideoPipeline.from_pretrained("demo", **{"model.from_pretrained": "modelscope:org/video/gone.safetensors"})
    with pytest.raises(UserError, match=r"ModelScope did not give org/gone \(ValueError: no such model\)"):
        VideoPipeline.from_pretrained("modelscope:org/gone")


def test_modelscope_has_to_be_installed(pipe):
    assert "modelscope" not in sys.modules
    with pytest.raises(UserError, match="needs the module modelscope, which is not installed"):
        pipe.push_to_hub("modelscope:org/video")
    assert hub.command_for("modelscope:org/t5") == "modelscope download --model org/t5 --local_dir org/t5"
