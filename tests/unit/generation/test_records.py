"""What the ``.json`` of a sample says about weights."""

import torch
from safetensors.torch import save_file

from opensora.config import load_config
from opensora.config.choices import ATTENTION_KERNELS
from opensora.config.commands import InferenceOptions
from opensora.generation.outputs import weight_records
from opensora.generation.writer import _attention_record
from opensora.utils.weights import fingerprint


def test_adapters_are_recorded_by_content_and_strength(tiny_config, tmp_path):
    (tmp_path / "style").mkdir()
    files = [tmp_path / "style" / "adapter_model.safetensors", tmp_path / "b.safetensors"]
    for number, file in enumerate(files):
        save_file({"transformer.img_in.lora_A.weight": torch.full((2, 16), float(number))}, file)
    entries = [f"{tmp_path / 'style'}@0.5", str(files[1])]
    records = weight_records(load_config(tiny_config, InferenceOptions, {"pretrained_lora_path": entries}))
    for number, (entry, file, strength) in enumerate(zip(entries, files, (0.5, 1.0))):
        expected = {"path": entry, "file": str(file), "sha256": fingerprint(file), "strength": strength}
        assert records[f"lora_{number}"] == expected
    assert records["lora_0"]["sha256"] != records["lora_1"]["sha256"]


def test_an_approximate_attention_kernel_is_recorded(tiny_config, monkeypatch):
    def halved(q, k, v):
        return v / 2

    halved.approximate = True
    monkeypatch.setattr(ATTENTION_KERNELS, "_added", {"halved": halved})
    for name, expected in (("halved", {"attention": {"model": "halved", "approximate": True}}), ("sdpa", {})):
        assert _attention_record(load_config(tiny_config, InferenceOptions, {"model.attn_backend": name})) == expected
