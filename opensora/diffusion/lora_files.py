"""LoRA files as trainers write them: PEFT folders, and single files of PEFT, diffusers, ComfyUI, Kohya and LyCORIS."""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.diffusion import lora_products
from opensora.models.inspect import inspect
from opensora.utils.errors import UserError, shorten
from opensora.utils.paths import read_text
from opensora.utils.weights import WEIGHT_SUFFIXES, all_finite, open_weights

CONFIG_NAME = "adapter_config.json"
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# what comes before the names of a model's modules, in whichever order
PREFIXES = (
    *("base_model.model.", "base_model.", "diffusion_model.", "transformer.", "model.", "module.", "unet."),
    *("_orig_mod.", "lora_unet_", "lora_transformer_", "lycoris_"),
)
# what a tensor is to its module, told by the end of its name; PEFT may write the adapter's name in it
ROLES = {
    role: re.compile(rf"(?P<module>.+)\.(?:{ending})")
    for role, ending in {
        "down": r"(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)??(?:\.weight)?",
        "up": r"(?:lora_B|lora_up|lora\.up)(?:\.(?!bias$)[^.]+)??(?:\.weight)?",
        "up_bias": r"lora_B(?:\.[^.]+)?\.bias",
        "magnitude": r"lora_magnitude_vector(?:\.[^.]+)??(?:\.weight)?|dora_scale",
        "alpha": r"alpha",
        "weight_change": r"diff",
        "bias_change": r"diff_b",
        "weight": r"weight",
        "bias": r"bias",
        **{part: part for part in lora_products.PARTS},
    }.items()
}
LEAST_DIMENSIONS = {
    **dict.fromkeys(("down", "up", *lora_products.PARTS), 2),
    **dict.fromkeys(("up_bias", "weight_change", "bias_change", "magnitude"), 1),
}
# kinds of adapters that are not read, told by the ends of the names of their tensors
OTHER_KINDS = {
    "OFT or BOFT": re.compile(r".+\.(oft_blocks|oft_diag|oft_r|boft_R|boft_s)(\..+)?"),
    "IA3": re.compile(r".+\.(on_input|ia3_l)(\..+)?"),
    "GLoRA": re.compile(r".+\.[ab][12]\.weight"),
    "VeRA or VB-LoRA": re.compile(r".+\.(vera_lambda_[bd]|vblora_.+)"),
    "LoCon, LoHa or LoKr of convolutions (Tucker)": re.compile(r".+\.(lora_mid\.weight|hada_t[12]|lokr_t[12])"),
    "changes of norms of LyCORIS": re.compile(r".+\.[wb]_norm"),
}
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")  # of a PEFT config, which change what its tensors mean
# variants of LoRA that a PEFT config may ask for, and that change what its tensors mean
UNKNOWN_VARIANTS = (
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters", "layer_replication"),
    *("trainable_token_indices", "fan_in_fan_out", "arrow_config", "monteclora_config", "kasa_config"),
)


@dataclass
class LoraFile:
    """An adapter as it is stored.

    Attributes:
        path: the file.
        modules: tensors by role (see :data:`ROLES`) of each module, under the name that the file gives it.
        others: names of tensors that are of no known role.
        config: PEFT's ``adapter_config.json``, empty without one.
        metadata: what the file records.
    """

    path: Path
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's two matrices is multiplied by: alpha / rank.

        Alpha is the module's own, that of the config or of the recorded facts, else the rank.
        """
        rslora = "alpha" not in self.modules[module] and self.config.get("use_rslora")
        return self.alpha(module, rank) / (math.sqrt(rank) if rslora else rank)

    def alpha(self, module: str, rank: int) -> float:
        """Alpha of a module, see :meth:`scale`."""
        stored = self.modules[module].get("alpha")
        if stored is not None:
            return float(stored)
        if self.config:
            return float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        with contextlib.suppress(TypeError, ValueError):
            return float(self.metadata.get("ss_network_alpha") or "") or float(rank)  # Kohya's 0 is the rank
        return float(rank)

    def rank(self, module: str) -> int | None:
        """Rank that the config says for a module, None without one."""
        return _by_pattern(self.config.get("rank_pattern"), module, self.config.get("r"))

    def targets(self, name: str) -> bool:
        """Whether the config's ``target_modules`` name a module; without any, all are."""
        targets, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if not targets or targets == "all-linear":
            return not _names(excluded, name)
        return _names(targets, name) and not _names(excluded, name)


def _names(patterns: Any, name: str) -> bool:
    """PEFT's rule: one text is a regular expression, a list has ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in patterns or ())


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    names = [*without_prefixes(name)]  # a pattern may begin with ^
    found = (v for key, v in (patterns or {}).items() if any(re.match(rf"(.*\.)?({key})$", each) for each in names))
    return next(found, default)


def without_prefixes(name: str) -> Iterator[str]:
    """A module's name, and what remains as prefixes are taken off it one by one."""
    yield name
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix) and name != prefix), None)
    if prefix:
        yield from without_prefixes(name.removeprefix(prefix))


def find_lora(path: str | Path) -> Path:
    """The weight file of an adapter: ``path`` itself, or the one in the folder ``path``.

    Raises:
        UserError: none there.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in WEIGHT_SUFFIXES:
            raise UserError(f"{path}: no adapter there; expected a folder, or a file of {', '.join(WEIGHT_SUFFIXES)}")
        return place
    for name in ADAPTER_NAMES:
        if (place / name).is_file():
            return place / name
    files = sorted(file for file in place.glob("*") if file.suffix in WEIGHT_SUFFIXES) if place.is_dir() else []
    if len(files) == 1 and not (place / CONFIG_NAME).exists() and not (place / "running_states.json").exists():
        return files[0]
    inside = [str(place / name) for name in ("lora", "lora_ema") if (place / name).is_dir()]
    hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
    if len(files) > 1:
        hint = f"; name one of its files: {shorten([file.name for file in files])}"
    raise UserError(f"{path}: no adapter there ({ADAPTER_NAMES[0]} is missing){hint}")


def read_lora(path: str | Path) -> LoraFile:
    """Read an adapter.

    Raises:
        UserError: none there, a damaged one, a kind of adapter that is not LoRA, numbers that are not finite.
    """
    file = find_lora(path)
    stored = open_weights(file)
    lora = LoraFile(file, config=_read_config(file.parent / CONFIG_NAME), metadata=stored.metadata)
    if not lora.config:
        lora.config = _recorded_config(lora.metadata)
    for key, value in stored.tensors():
        found = next(((role, match["module"]) for role, rule in ROLES.items() if (match := rule.fullmatch(key))), None)
        if kind := other_kind(key):
            raise UserError(
                f"{file} is an adapter of the kind {kind} ({key}); LoRA, DoRA, LoHa and LoKr of linear layers are "
                "known: merge it into the weights with the program that has trained it, and give these"
            )
        if found is None:
            lora.others.append(key)
            continue
        role, module = found
        if role in lora.modules.setdefault(module, {}):
            raise UserError(f"{file} has two adapters: {key} and another tensor for {module}")
        if not value.is_floating_point() and role != "alpha":
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{file}: {key} holds {kind}, not weights: a quantised adapter cannot be used")
        if not value.numel():
            raise UserError(f"{file}: {key} is empty, of shape {[*value.shape]}: get the adapter again")
        if value.ndim < LEAST_DIMENSIONS.get(role, 0):
            raise UserError(f"{file}: {key} is of shape {[*value.shape]}, not a matrix: get the adapter again")
        if role == "alpha" and (value.numel() != 1 or value.is_complex() or value.dtype is torch.bool):
            raise UserError(f"{file}: {key} must be one number")
        if value.is_floating_point() and not all_finite(value):
            raise UserError(
                f"{file}: {key} is not finite (NaN or infinity): the adapter is damaged, use an earlier one"
            )
        lora.modules[module][role] = value
    changing = {"down", "weight_change", *lora_products.PARTS}
    if not any(changing & parts.keys() for parts in lora.modules.values()):
        raise UserError(f"{file} is no LoRA adapter: it holds {inspect(file)}")
    return lora


def other_kind(key: str) -> str | None:
    """The kind of adapter that a tensor's name tells, if it is one that is not read."""
    return next((kind for kind, rule in OTHER_KINDS.items() if rule.fullmatch(key)), None)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(read_text(file))
        kind = config.get("peft_type", "LORA")
        _check_config(config)
    except (OSError, ValueError, AttributeError, TypeError, re.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no config of an adapter ({error}): get the adapter again") from error
    if str(kind).rpartition(".")[2] != "LORA":
        raise UserError(
            f"{file}: an adapter of the kind {kind}; LORA is known: merge it into the weights with PEFT's "
            "merge_and_unload, and give these"
        )
    unknown = [key for key in UNKNOWN_VARIANTS if config.get(key)]
    if unknown:
        raise UserError(f"{file}: {', '.join(unknown)} is set: this variant of LoRA is not known")
    return config


def _check_config(values: Mapping[str, Any]) -> None:
    """Raises ValueError for values that no adapter has."""
    patterns = {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    numbers = {"r": values.get("r", 8), "lora_alpha": values.get("lora_alpha", 8)}
    for key, value in (*numbers.items(), *((k, v) for p in patterns.values() for k, v in p.items())):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}={value!r} is not a number")
    for key in FLAGS:
        if not isinstance(values.get(key), bool | None):
            raise ValueError(f"{key}={values[key]!r} is neither true nor false")
    for pattern in (*patterns["rank_pattern"], *patterns["alpha_pattern"]):
        re.compile(pattern)
    for key in ("target_modules", "exclude_modules"):
        value = values.get(key)
        if isinstance(value, str):
            re.compile(value)
        elif value is not None and not all(isinstance(each, str) for each in value):
            raise ValueError(f"{key}={value!r} is no list of names")


def _recorded_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The config that diffusers records in the file itself, without the name of the part it is for."""
    try:
        recorded = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in recorded.items()}
        _check_config(config)
    except (ValueError, AttributeError, TypeError, re.error):
        return {}
    return config if "lora_alpha" in config else {}
