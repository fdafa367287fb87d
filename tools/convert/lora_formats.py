"""LoRA adapters as PEFT, diffusers, and Kohya's trainers and ComfyUI store them."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.diffusion.lora_files import ADAPTER_NAMES, CONFIG_NAME, LoraFile
from opensora.utils.errors import UserError, shorten
from opensora.utils.files import write_beside
from opensora.utils.weights_writing import save_safetensors
from tools.convert.lora_layouts import Entry

PEFT, DIFFUSERS, KOHYA = "peft", "diffusers", "kohya"
FORMATS = {PEFT: PEFT, DIFFUSERS: DIFFUSERS, KOHYA: KOHYA, "comfyui": KOHYA}  # --to
CONFIG_KEY = "peft_config"  # metadata: PEFT's config of the adapter that a file was made from
DIFFUSERS_KEY = "lora_adapter_metadata"
OF_DIFFUSERS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "lora_bias")
NEW_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
}
NEW_CONFIG |= {"lora_dropout": 0.0, "bias": "none", "init_lora_weights": True}


def plain_alphas(entries: list[Entry], where: Path) -> list[Entry]:
    """Entries whose alpha is divided by the rank, from those of rsLoRA, where it is divided by the square root of that.

    Raises:
        UserError: a square root that no alpha can stand for exactly.
    """
    odd = [entry.parts[0] for entry in entries if math.isqrt(entry.rank) ** 2 != entry.rank]
    if odd:
        raise UserError(
            f"{where}: it is of rsLoRA, alpha over the square root of the rank, which is no whole number for "
            f"{shorten(odd)}: here only --to peft or diffusers, without a change of the QKV layout, is exact"
        )
    return [replace(entry, alpha=entry.alpha * math.isqrt(entry.rank)) for entry in entries]


def write_peft(
    folder: Path, entries: Mapping[str, Entry], of_peft: Mapping[str, Any], metadata: dict[str, str]
) -> None:
    """A folder as ``PeftModel.save_pretrained`` leaves it."""
    text = json.dumps(of_peft, indent=2, sort_keys=True)
    write_beside(folder / CONFIG_NAME, lambda temporary: Path(temporary).write_text(text + "\n", encoding="utf-8"))
    save_safetensors(_tensors(entries, "base_model.model."), folder / ADAPTER_NAMES[0], metadata)


def write_diffusers(
    file: Path, entries: Mapping[str, Entry], of_peft: Mapping[str, Any], metadata: dict[str, str]
) -> None:
    """A file as ``FluxPipeline.save_lora_weights`` writes it, with ranks and alphas in its metadata."""
    _refuse_magnitude(entries, "diffusers does not load it from a file")
    stored = {f"transformer.{key}": of_peft[key] for key in OF_DIFFUSERS if key in of_peft}
    save_safetensors(
        _tensors(entries, "transformer."),
        file,
        {**metadata, DIFFUSERS_KEY: json.dumps(stored, indent=2, sort_keys=True)},
    )


def write_kohya(file: Path, entries: Mapping[str, Entry], metadata: dict[str, str]) -> None:
    """A file as Kohya's sd-scripts writes it and ComfyUI reads it: an alpha for each module.

    Raises:
        UserError: what the format does not have.
    """
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if "up_bias" in entry.rows:
            raise UserError(f"{name} has a bias of its adapter, which this format does not have: use --to peft")
        module = "lora_unet_" + name.replace(".", "_")
        if "magnitude" in entry.rows:
            state[f"{module}.dora_scale"] = entry.rows["magnitude"][:, None].contiguous()
        alpha = torch.tensor(entry.alpha)
        alike = alpha.to(entry.down.dtype)
        state |= {f"{module}.lora_down.weight": entry.down, f"{module}.lora_up.weight": entry.up}
        state[f"{module}.alpha"] = alike if float(alike) == float(alpha) else alpha
    ranks, alphas = ({getattr(entry, key) for entry in entries.values()} for key in ("rank", "alpha"))
    facts = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    known = {key: str(values.pop()) for key, values in facts.items() if len(values) == 1}
    others = {key: value for key, value in metadata.items() if key not in facts}
    save_safetensors(state, file, {"ss_network_module": "networks.lora_flux", **others, **known})


def _tensors(entries: Mapping[str, Entry], prefix: str) -> dict[str, Tensor]:
    """Tensors under PEFT's names."""
    names = {"up_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        state |= {f"{prefix}{name}.lora_A.weight": entry.down, f"{prefix}{name}.lora_B.weight": entry.up}
        state |= {f"{prefix}{name}.{names[role]}": value for role, value in entry.rows.items()}
    return state


def _refuse_magnitude(entries: Mapping[str, Entry], reason: str) -> None:
    having = [name for name, entry in entries.items() if "magnitude" in entry.rows]
    if having:
        raise UserError(f"{shorten(having)}: DoRA, and {reason}; use --to peft")


def config_of(entries: Mapping[str, Entry], base: Mapping[str, Any], rslora: bool, where: Path) -> dict[str, Any]:
    """PEFT's config for an adapter.

    Args:
        entries: by module.
        base: the config of what it was made from, maybe empty; kept as it is if it says the same of each module.
        rslora: alphas are over the square root of the rank.
        where: the file, for :class:`LoraFile`.
    """
    as_base = entries
    if base.get("use_rslora") and not rslora:  # what `plain_alphas` made of it
        as_base = {name: replace(entry, alpha=entry.alpha / math.sqrt(entry.rank)) for name, entry in entries.items()}
    if base and bool(base.get("use_rslora")) >= rslora and _says(base, as_base, where):
        return dict(base)
    r, alpha = (Counter(getattr(e, key) for e in entries.values()).most_common(1)[0][0] for key in ("rank", "alpha"))
    return {
        **NEW_CONFIG,
        **base,
        "r": r,
        "lora_alpha": _number(alpha),
        "rank_pattern": {f"^{_escaped(name)}": e.rank for name, e in sorted(entries.items()) if e.rank != r},
        "alpha_pattern": {
            f"^{_escaped(name)}": _number(e.alpha) for name, e in sorted(entries.items()) if e.alpha != alpha
        },
        "target_modules": sorted(entries),
        "exclude_modules": None,
        "use_rslora": rslora,
        "use_dora": any("magnitude" in entry.rows for entry in entries.values()),
        "lora_bias": any("up_bias" in entry.rows for entry in entries.values()),
    }


def _says(of_peft: Mapping[str, Any], entries: Mapping[str, Entry], where: Path) -> bool:
    file = LoraFile(where, {name: {} for name in entries}, config=dict(of_peft))
    return all(
        file.targets(name) and file.rank(name) == entry.rank and file.alpha(name, entry.rank) == entry.alpha
        for name, entry in entries.items()
    )


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
