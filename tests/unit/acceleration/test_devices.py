"""Devices by their names."""

import pytest
import torch

from opensora.acceleration.devices import pick_device
from opensora.utils.errors import UserError


@pytest.mark.parametrize("name", ["mps", "xpu", "hip", "meta", "CPU", "cpu,cuda", "cuda:x", "7", "cuda:9999"])
def test_what_is_no_device_here_is_named(name):
    with pytest.raises(UserError, match=f"device '?{name}'?"):
        pick_device(name)


def test_there_is_one_cpu():
    assert pick_device("cpu") == pick_device("cpu:3") == torch.device("cpu")
