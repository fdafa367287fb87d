"""How much memory there is, and amounts of it as people write them."""

import pytest
import torch

from opensora.acceleration import memory
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.utils.errors import UserError
from opensora.utils.sizes import parse_bytes

GIB = 2**30


def test_memory_of_this_machine_and_of_a_container(monkeypatch, tmp_path):
    total, left = memory.memory_of(torch.device("cpu"))
    assert 0 < left <= total
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{GIB}\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", tuple(str(tmp_path / name) for name in ("max", "absent")))
    unlimited = memory.memory_of(torch.device("cpu"))[0]
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "limit"),))
    total, left = memory.memory_of(torch.device("cpu"))
    assert (total, left <= total) == (min(GIB, unlimited), True)
    assert memory.room_on(torch.device("cpu"), limit=1) > 1, "which is one of GPUs"


def test_room_on_a_gpu_held_to_a_share(monkeypatch):
    """``cuda`` without a number is the current one, also where torch wants the number."""

    def fraction(device):
        assert device == 1
        return 0.25

    cuda = {
        "mem_get_info": lambda device: (70 * GIB, 80 * GIB),
        "memory_allocated": lambda device: 3 * GIB,
        "memory_reserved": lambda device: 5 * GIB,
        "current_device": lambda: 1,
        "get_per_process_memory_fraction": fraction,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for device in (torch.device("cuda"), torch.device("cuda", 1)):
        assert memory.room_on(device) == 17 * GIB
        assert memory.room_on(device, limit=10 * GIB) == 7 * GIB


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("15.5GiB", int(15.5 * GIB)), ("800 MB", 800 * 10**6), ("16", 16 * 10**9), ("1G", 10**9)],
)
def test_amounts(text, count):
    assert parse_bytes(text, "gpu_memory") == count


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1GB", "16 apples", "much", "1e3", "1,5GB", "nan"])
def test_what_is_no_amount_is_refused_before_anything_else(text):
    with pytest.raises(UserError, match=r"gpu_memory=.*: give an amount of memory above 0, such as 16GB"):
        load_config({"gpu_memory": text}, InferenceOptions)
