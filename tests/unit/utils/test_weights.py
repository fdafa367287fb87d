"""Finding, reading, checking and writing weights."""

import json
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opensora.config.options import ModelOptions
from opensora.models.build import check_weights
from opensora.utils import hub, weights_writing
from opensora.utils.errors import UserError
from opensora.utils.weights import (
    all_finite,
    check_finite,
    files_hash,
    fingerprint,
    load_state_dict,
    open_weights,
    resolve_path,
)
from opensora.utils.weights_loading import load_model
from opensora.utils.weights_writing import save_safetensors


class Net(nn.Module):
    """Weights, a persistent buffer, and a buffer outside the state dict."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2, bias=False)
        self.first.bias.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.empty(5), persistent=False)
        self.reset_buffers(self.table.device)

    def reset_buffers(self, device):
        self.table = torch.arange(5.0, device=device)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    model.steps.fill_(7)
    return model


@pytest.fixture
def file(net, tmp_path):
    path = tmp_path / "net.safetensors"
    save_safetensors(net.state_dict(), path, {"layout": "a"})
    return path


def same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_model_is_built_without_memory_and_filled(net, file):
    model = load_model(Net, file)
    same(model.state_dict(), net.state_dict())
    assert torch.equal(model.table, torch.arange(5.0))
    assert not model.first.bias.requires_grad
    assert model.first.weight.requires_grad
    half = load_model(Net, file, dtype=torch.bfloat16)
    assert half.first.weight.dtype == torch.bfloat16
    assert half.steps.dtype == torch.int64


def test_training_does_not_write_into_the_file(net, file):
    model = load_model(Net, file)
    with torch.no_grad():
        model.first.weight.add_(1)
    same(load_state_dict(file), net.state_dict())


def sharded(state, folder, suffix="safetensors"):
    folder.mkdir(parents=True)
    weight_map = {}
    for number, key in enumerate(state):
        name = f"part-{number}.{suffix}"
        if suffix == "safetensors":
            save_file({key: state[key]}, folder / name)
        else:
            torch.save({key: state[key]}, folder / name)
        weight_map[key] = name
    index = {"metadata": {"total_size": 1, "layout": "b"}, "weight_map": weight_map}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_with_index(net, tmp_path, suffix):
    sharded(net.state_dict(), tmp_path / "shards", suffix)
    same(load_state_dict(tmp_path / "shards"), net.state_dict())
    assert open_weights(tmp_path / "shards").metadata["layout"] == "b"
    (tmp_path / "shards" / f"part-1.{suffix}").unlink()
    with pytest.raises(UserError, match=f"not there: part-1.{suffix}"):
        load_state_dict(tmp_path / "shards")


def test_training_checkpoint_folder(net, tmp_path):
    checkpoint = tmp_path / "run" / "epoch0-global_step10"
    sharded(net.state_dict(), checkpoint / "model")
    save_file({"other": torch.zeros(1)}, checkpoint / "ema.safetensors")
    same(load_state_dict(checkpoint), net.state_dict())
    with pytest.raises(UserError, match="epoch0-global_step10"):
        load_state_dict(tmp_path / "run")


def test_folder_with_one_file(net, file, tmp_path):
    same(load_state_dict(tmp_path), net.state_dict())
    save_file({"a": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="name one of them"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_may_be_named_but_not_one_shard(net, tmp_path, suffix):
    sharded(net.state_dict(), tmp_path / "shards", suffix)
    same(load_state_dict(tmp_path / "shards" / f"model.{suffix}.index.json"), net.state_dict())
    with pytest.raises(UserError, match=rf"one of {len(net.state_dict())} shards .*: name the folder .*shards"):
        load_state_dict(tmp_path / "shards" / f"part-0.{suffix}")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [None, "state_dict"])
def test_pickled_tensors(net, tmp_path, legacy, wrap):
    state = net.state_dict()
    torch.save({wrap: state} if wrap else state, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    same(load_model(Net, tmp_path / "net.pt").state_dict(), state)


def test_pickles_run_no_code(tmp_path):
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"more than tensors \(torch.nn.modules.linear.Linear\)") as error:
        load_state_dict(tmp_path / "net.pt")
    assert "weights_only" not in str(error.value)  # torch's own message says how to run the code
    torch.save({"a": 3}, tmp_path / "net.pt")
    with pytest.raises(UserError, match="state dict"):
        load_state_dict(tmp_path / "net.pt")


def test_truncated_and_foreign_files(file, tmp_path):
    content = file.read_bytes()
    for size in (0, 5, 40, len(content) - 8):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match="truncated or not a safetensors file"):
            load_state_dict(file)
    file.write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_state_dict(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_state_dict(file)
    (tmp_path / "net.pt").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="truncated"):
        load_state_dict(tmp_path / "net.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"give it the suffix \.safetensors"):
        load_state_dict(tmp_path / "net.pt")
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"written by torch.save: give it the suffix \.pt"):
        load_state_dict(file)
    (tmp_path / "net.txt").write_text("")
    with pytest.raises(UserError, match="not a weight file"):
        load_state_dict(tmp_path / "net.txt")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        (
            "./ckpts/Open_Sora_v2.safetensors",
            "hf download hpcai-tech/Open-Sora-v2 Open_Sora_v2.safetensors --local-dir ckpts",
        ),
        (
            "ckpts/hunyuan_vae.safetensors",
            "hf download hpcai-tech/Open-Sora-v2 hunyuan_vae.safetensors --local-dir ckpts",
        ),
        (
            "/data/F32T4C128_AE.safetensors",
            "hf download hpcai-tech/Open-Sora-v2-Video-DC-AE F32T4C128_AE.safetensors --local-dir /data",
        ),
        (
            "./ckpts/google/t5-v1_1-xxl",
            'hf download hpcai-tech/Open-Sora-v2 --include "google/t5-v1_1-xxl/*" --local-dir ckpts',
        ),
        ("ae.safetensors", "hf download black-forest-labs/FLUX.1-dev ae.safetensors --local-dir ."),
    ],
)
def test_missing_released_file_says_how_to_get_it(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        resolve_path(path)
    assert str(error.value).splitlines()[-1].strip() == command


@pytest.mark.parametrize("path", [None, 3, b"a", ["a"]])
def test_what_is_no_path_is_named(path):
    with pytest.raises(UserError, match=r"^weights .*: give a path"):
        open_weights(path)


def test_missing_local_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    monkeypatch.setattr(hub, "download", None)  # a path below an existing folder never goes to the hub
    with pytest.raises(UserError, match=r"No weights at outputs/run/model.safetensors"):
        resolve_path("outputs/run/model.safetensors")


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: True)


def test_hub_ids_come_after_local_files(file, tmp_path, monkeypatch, online):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(repo, inside, cache_dir=None, local_files_only=None):
        assert not local_files_only
        asked.append((repo, inside, cache_dir))
        if inside == "absent.safetensors":
            raise OSError("404 not found\nmore")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_path("org/repo/sub/net.safetensors", cache_dir="cache") == file
    assert asked == [("org/repo", "sub/net.safetensors", "cache")]
    with pytest.raises(UserError, match=r"org/repo did not give absent.safetensors .*404 not found\)"):
        resolve_path("org/repo/absent.safetensors")
    (tmp_path / "org/repo/sub").mkdir(parents=True)
    local = tmp_path / "org/repo/sub/net.safetensors"
    local.write_bytes(file.read_bytes())
    assert resolve_path("org/repo/sub/net.safetensors").resolve() == local


def test_hub_folders(tmp_path, monkeypatch, online):
    (tmp_path / "snapshot/sub").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path / "snapshot"))
    assert resolve_path("org/repo/sub") == tmp_path / "snapshot/sub"
    with pytest.raises(UserError, match="no folder other"):
        resolve_path("org/repo/other")


def unplug(monkeypatch):
    """No network: requests of the hub's library fail at once, and each is counted."""
    asked = []

    def request(*args, **kwargs):
        asked.append(args)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=request, request=request))
    return asked


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("org/repo/sub/net.safetensors", "hf download org/repo sub/net.safetensors --local-dir org/repo"),
        ("org/repo/sub", 'hf download org/repo --include "sub/*" --local-dir org/repo'),
    ],
)
def test_hub_paths_without_a_network(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = unplug(monkeypatch)
    with pytest.raises(UserError, match="hub cannot be reached") as error:
        resolve_path(path, cache_dir=str(tmp_path / "cache"))
    assert str(error.value).splitlines()[-1].strip() == command
    assert len(asked) == 1  # the library alone tries again and again, for half a minute


def test_downloaded_files_are_found_without_a_network(tmp_path, monkeypatch):
    unplug(monkeypatch)
    repo = tmp_path / "cache/models--org--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("f" * 40)
    stored = repo / "snapshots" / ("f" * 40) / "sub/net.safetensors"
    stored.parent.mkdir(parents=True)
    stored.touch()
    cache = str(tmp_path / "cache")
    assert resolve_path("org/repo/sub/net.safetensors", cache_dir=cache) == stored
    with pytest.raises(UserError, match="hub cannot be reached"):
        resolve_path("org/repo/other/net.safetensors", cache_dir=cache)


def test_a_checkpoint_that_is_not_there_is_no_hub_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "outputs/x/epoch0-global_step2"
    with pytest.raises(UserError, match=f"No weights at {path}. Check the path"):
        check_weights("model", ModelOptions(type="flux", from_pretrained=path))


@pytest.mark.parametrize("path", ["outputs/x/weights", "org/repo/net.safetensors"])
def test_a_check_asks_the_hub_without_a_download(path, tmp_path, monkeypatch):
    """A mistyped path of three parts is found before anything is loaded, as by a dry run."""
    monkeypatch.chdir(tmp_path)
    section = ModelOptions(type="flux", from_pretrained=path, cache_dir=str(tmp_path / "cache"))
    unplug(monkeypatch)
    with pytest.raises(UserError, match=f"No weights at {path}: there is no such local path, and .*cannot be reached"):
        check_weights("model", section)
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    repository, _, inside = path.rpartition("/")
    for there in ([inside], []):
        monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda self, repo, paths, there=there: there)
        if there:
            check_weights("model", section)
        else:
            with pytest.raises(UserError, match=f"{repository} did not give {inside} .*it has no {inside}"):
                check_weights("model", section)
    assert not (tmp_path / "cache").exists()


def test_mismatch_lists_keys_and_hints(file):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 5)
            self.third = nn.Linear(1, 1)

    with pytest.raises(UserError) as error:
        load_model(Other, file, explain=lambda shapes: [f"first has {shapes['first.weight'][0]} rows"])
    message = str(error.value)
    assert str(file) in message
    assert "first has 4 rows" in message
    assert "missing in the file: third.weight, third.bias" in message
    assert "not in the model: second.weight, steps" in message or "not in the model: steps, second.weight" in message
    assert "first.weight [4, 3] instead of [5, 3]" in message


def test_recorded_layout_is_checked(file):
    load_model(Net, file, metadata={"layout": "a", "unrecorded": "x"})
    with pytest.raises(UserError, match=r"records layout=a, the config says b: set model.layout=a"):
        load_model(Net, file, metadata={"layout": "b"})


def test_allowed_differences(net, tmp_path):
    state = net.state_dict()
    del state["first.weight"], state["first.bias"]
    save_safetensors({**state, "extra.weight": torch.ones(1)}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"first\.weight"):
        load_model(Net, tmp_path / "net.safetensors", allow_unexpected=["extra."])
    model = load_model(Net, tmp_path / "net.safetensors", allow_missing={"first.": 0.5}, allow_unexpected=["extra."])
    assert model.first.weight.eq(0.5).all()
    assert torch.equal(model.second.weight, net.second.weight)


def test_written_whole_or_not_at_all(file, monkeypatch):
    before = file.read_bytes()

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights_writing, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors({"a": torch.zeros(2)}, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_written_tensors_and_metadata(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    path = tmp_path / "new/folder/a.safetensors"
    save_safetensors({"a": shared, "b": shared, "t": shared.t(), "row": shared[1]}, path, {"layout": "a"})
    same(load_state_dict(path), {"a": shared, "b": shared, "t": shared.t(), "row": shared[1]})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "layout": "a"}


MEASURE = """
import sys, torch
from torch import nn
from opensora.utils.weights_loading import load_model

def peak():
    # not getrusage: its maximum is inherited from the process that forked this one
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

build = lambda: nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(15)])
load_model(lambda: nn.Linear(2, 2), sys.argv[1])
before = peak()
model = load_model(build, sys.argv[2], dtype=getattr(torch, sys.argv[3]))
for parameter in model.parameters():
    parameter.detach().view(torch.int16)[:, ::64].sum()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_stays_close_to_the_file(tmp_path, dtype):
    save_safetensors({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "tiny.safetensors")
    path = tmp_path / "net.safetensors"
    save_safetensors({f"{i}.weight": torch.ones(1024, 1024) for i in range(15)}, path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "tiny.safetensors"), str(path), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    size = path.stat().st_size / 2**20
    assert size / 4 < float(result.stdout) < 1.2 * size


def test_fingerprints_tell_weights_not_files(tmp_path):
    """Equal weights share theirs in any kind, order and number of files; a change in any tensor, at any place that is
    sampled, or of its type or shape gives another."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 5), "b": torch.randn(400, 300), "n": torch.tensor(2, dtype=torch.int64)}
    same = [tmp_path / name for name in ("a.safetensors", "b.pt", "c")]
    save_safetensors(weights, same[0], {"layout": "split"})
    torch.save(dict(reversed(weights.items())), same[1])
    save_safetensors({"a": weights["a"]}, same[2] / "m-1.safetensors")
    save_safetensors({key: weights[key] for key in "bn"}, same[2] / "m-2.safetensors")
    parts = {"a": "m-1.safetensors", "b": "m-2.safetensors", "n": "m-2.safetensors"}
    (same[2] / "m.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (ours,) = {fingerprint(path) for path in same}
    last = weights["b"].clone()
    last[-1, -1] += 1
    changes = [{"b": last}, {"n": torch.tensor(3)}, {"a": weights["a"].half()}, {"a": weights["a"].reshape(5, 3)}]
    found = set()
    for number, change in enumerate(changes):
        save_safetensors({**weights, **change}, tmp_path / f"{number}.safetensors")
        found.add(fingerprint(tmp_path / f"{number}.safetensors"))
    assert len(found - {ours}) == len(changes)


def test_fingerprint_of_a_checkpoint_is_of_the_weights_that_are_loaded(tmp_path):
    for file, value in (("model/model.safetensors", 1.0), ("ema.safetensors", 2.0)):
        save_safetensors({"w": torch.full((2,), value)}, tmp_path / file)
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize(("size", "known"), [(1000, "d1899872004c9ed2"), (3_000_000, "618ba4667be75d33")])
def test_hashes_in_caches_stay(tmp_path, size, known):
    """Caches that earlier versions made name their encoders by it."""
    (tmp_path / "w.bin").write_bytes(bytes(i % 251 for i in range(size)) * 4)
    assert files_hash(tmp_path) == known


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
def test_what_is_not_finite_is_seen_in_all_types(kind):
    values = torch.tensor([[0.0, -224.0], [240.0, -0.0]]).to(getattr(torch, kind))
    assert all_finite(values)
    check_finite("a", values, "file")
    for wrong in (float("nan"), float("inf"), float("-inf")):
        bad = torch.tensor([[0.0, wrong], [240.0, -0.0]]).to(getattr(torch, kind))
        if bool(bad.float().isfinite().all()):
            continue  # a type without infinity, whose greatest number it becomes
        assert not all_finite(bad)
        with pytest.raises(UserError, match=f"a is not finite.*{kind}"):
            check_finite("a", bad, "file")
