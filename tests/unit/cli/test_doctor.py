"""What ``opensora doctor`` finds, and how it ends."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opensora.cli import doctor, findings

ROOT = Path(__file__).parents[3]
BARE = """
import sys
for name in ("torch", "mmengine", "numpy", "av", "psutil", "packaging"):
    sys.modules[name] = None
sys.argv = ["opensora", "doctor"]
from opensora.cli.main import main
main()
"""


def found(part) -> dict[str, findings.Finding]:
    return {each.name: each for each in part}


def test_this_machine(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "STEPS", 1)
    doctor.main([])
    told = capsys.readouterr().out
    for line in ("ok  python", "ok  torch ", "ok  av ", "ok  memory", "ok  configs", "ok  demo "):
        assert f"\n{line}" in f"\n{told}"
    assert told.endswith("\nall in order\n")
    assert list(tmp_path.iterdir()) == []


def test_without_anything_but_python():
    """It says what is missing, and what installs it."""
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    told = " ".join(done.stdout.split())
    assert "!! torch not there -> pip install torch " in told
    assert "!! av cannot be imported: " in told
    assert done.stdout.endswith("\nnot in order: torch, av\n")
    assert done.stderr == ""


def test_a_failing_demo(monkeypatch, capsys):
    def fail(name):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr("opensora.diffusion.pipeline.VideoPipeline.from_pretrained", fail)
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    assert end.value.code == 1
    told = capsys.readouterr().out
    assert "!!  demo              RuntimeError: no kernel image\n" in told
    assert told.endswith("not in order: demo\n")
    doctor.main(["--no-demo"])
    assert "demo" not in capsys.readouterr().out


def test_needed_packages(monkeypatch):
    wanted = ["nowhere>=1", "numpy>=999", "einops>=0.1", 'gone; extra == "chat"', 'never; python_version < "3"']
    monkeypatch.setattr(findings.metadata, "requires", lambda name: wanted)
    said = found(findings.requirements())
    assert said["nowhere"] == ("nowhere", "not there", "missing", 'pip install "nowhere>=1"')
    assert said["numpy"].state == "missing"
    assert said["numpy"].text.endswith(", needs >=999")
    assert said["packages"].text == "1 of 3 that are needed are there"


def test_packages_of_use(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c10\\nmore')")
    (tmp_path / "xformers.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    said = found(findings.optional_packages(torch_is_there=True))
    assert {name: said[name].state for name in ("flash-attn", "xformers", "liger-kernel")} == {
        "flash-attn": "note",
        "xformers": "ok",
        "liger-kernel": "note",
    }
    assert "cannot be imported (undefined symbol: _ZN3c10): model.attn_backend flash2" in said["flash-attn"].text
    monkeypatch.setattr(findings.shutil, "which", lambda name: None)
    assert found(findings.optional_packages(torch_is_there=False))["C++ compiler"].fix == "apt install g++"
    assert said["liger-kernel"].fix == "pip install liger-kernel"
    assert found(findings.optional_packages(torch_is_there=False))["flash-attn"].state == "ok", "not tried"


def card(major: int) -> SimpleNamespace:
    facts = SimpleNamespace(name="Some GPU", major=major, minor=5)
    cuda = SimpleNamespace(get_device_properties=lambda i: facts, mem_get_info=lambda i: (2**30, 2**34))
    return SimpleNamespace(cuda=cuda)


def test_cards():
    assert findings._card(card(9), 0).text == "Some GPU, 16.0 GiB, 1.0 free, compute capability 9.5, bf16"
    assert "no bf16: give --dtype fp16 or fp32" in findings._card(card(7), 1).text

    def broken(index):
        raise RuntimeError("CUDA error: out of memory\nmore")

    taken = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=broken))
    assert findings._card(taken, 0).text == "cannot be used: CUDA error: out of memory"


def test_little_room(monkeypatch, tmp_path):
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
    said = found(findings.room(tmp_path))
    assert said["disk"].state == "note"
    if Path("/dev/shm").is_dir():
        assert "--shm-size" in said["shared memory"].fix
