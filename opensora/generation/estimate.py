"""What a run takes of a GPU, by stage: memory and seconds on cards that people have, and the flags that make it fit.

Estimates: memory from sizes (weights exact, activations about), seconds from peak rates (`opensora.diffusion.cards`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_type_hints

import torch

from opensora.config.commands import InferenceOptions
from opensora.diffusion.cards import TEXT_SECONDS, Card
from opensora.diffusion.conditions import get_spans
from opensora.diffusion.decode import window_work
from opensora.diffusion.plan import SamplePlan
from opensora.diffusion.prepared import TEXT_ENCODERS, PreparedRun, text_length
from opensora.generation.room import activations_of, parameter_counts, weight_bytes
from opensora.models.autoencoder import as_autoencoder
from opensora.models.vae.fitting import Fit, fit_tiling
from opensora.models.vae.footprint import Cost
from opensora.utils.sizes import gib, seconds_text  # noqa: F401 - found here by those who print estimates

RELEASED_ENCODERS = {"t5": (4096, 4_762_310_656), "clip": (768, 123_060_480)}  # width, parameters
TEXT_WORK = 0.3 * 2**30  # bytes of activations of the text encoders, for texts of 512 tokens
QUANTIZED = {"fp8": 0.51, "int8": 0.51, "nf4": 0.29}  # of an encoder of which only the size is known
KINDS = ("int8", "nf4")  # of weights that are proposed where nothing else fits; the smaller loss first


@dataclass(frozen=True)
class Way:
    """A way to run: what is added to the command line, and what it means.

    Attributes:
        flags: added to the command line.
        offload: models are on the device one at a time.
        streams: weights of transformer and T5 come a block ahead of the computation (``--offload blocks``).
        quantize: kind of the transformer's weights.
        t5_quantize: kind of T5's weights.
    """

    flags: str = ""
    offload: bool = False
    streams: bool = False
    quantize: str | None = None
    t5_quantize: str | None = None

    def kind_of(self, name: str) -> str | None:
        """Kind of the weights of a model, None for that of the config."""
        return {"model": self.quantize, "t5": self.t5_quantize}.get(name)


@dataclass(frozen=True)
class Outlook:
    """What a run is expected to take on a card.

    Attributes:
        way: how it runs there.
        peaks: bytes on the device by stage.
        seconds: by stage.
        tiles: those it decodes in, if they are not the config's.
        fits: whether the card has the room.
    """

    way: Way
    peaks: dict[str, float]
    seconds: dict[str, float]
    tiles: str
    fits: bool

    @property
    def peak(self) -> float:
        """The largest of the peaks."""
        return max(self.peaks.values())

    @property
    def total(self) -> float:
        """Seconds of a sample."""
        return sum(self.seconds.values())


class Estimate:
    """A run in figures.

    Args:
        run: prepared.
        plan: a sample, the most costly one.
    """

    def __init__(self, run: PreparedRun, plan: SamplePlan) -> None:
        self.run, self.plan = run, plan
        self.ae = as_autoencoder(run.models["ae"])
        self.own = Way("", offload=bool(run.cfg.offload), streams=run.cfg.offload in ("blocks", "disk"))

    def weights(self, way: Way) -> dict[str, float]:
        """Bytes of each model."""
        run, found = self.run, {}
        counts, _ = parameter_counts(run)
        for name, section in run.sections.items():
            released = RELEASED_ENCODERS.get(name, (0, 0))
            if name not in counts:
                widths = {"t5": run.model.config.context_in_dim, "clip": run.model.config.vec_in_dim}
                count = released[1] if widths.get(name) == released[0] else 0
                found[name] = count * run.dtype.itemsize * QUANTIZED.get(way.kind_of(name) or "", 1.0)
                continue
            changed = run
            if way.kind_of(name) is not None:
                keys: dict[str, Any] = {"quantize": way.kind_of(name)}
                sections = {**run.sections, name: dataclasses.replace(section, **keys)}
                changed = dataclasses.replace(run, sections=sections)
            found[name] = float(weight_bytes(changed, name, counts[name]))
        return found

    def modulation(self, way: Way) -> float:
        """Bytes of weights that leave the device while a sample is made."""
        if not self.run.cfg.precompute:
            return 0.0
        layers = self.run.model.modulation_layers().values()
        return float(sum(p.numel() for layer in layers for p in layer.parameters()) * self.run.dtype.itemsize)

    @cached_property
    def decoding(self) -> Cost | None:
        """Of a video in the config's tiles."""
        return self.ae.decode_cost(self.plan.latent_size, self.run.dtype)

    @cached_property
    def encoding(self) -> Cost | None:
        """Of the longest reference; of one as long as the video, where each sample says what it gives."""
        if not self.plan.has_image:
            return None
        ratio, causal = self.plan.spec.compression[0], self.plan.spec.is_causal
        spans = get_spans(self.plan.cond_type)
        frames = max((span.pixel_frames(causal, ratio) for span in spans), default=self.plan.num_frames)
        return self.ae.encode_cost((frames, self.plan.height, self.plan.width), self.run.dtype)

    def tiles(self, room: float) -> Fit | None:
        """Tiles to decode in within ``room`` bytes; what others take is taken to be proportional to their size."""
        tiling, cost, size = self.ae.tiling, self.decoding, self.plan.latent_size
        if tiling is None or cost is None:
            return None
        per_latent = cost.peak / tiling.volume(size)
        return fit_tiling(tiling, size, int(room), lambda other: int(per_latent * other.volume(size)))

    def peaks(self, way: Way, room: float) -> tuple[dict[str, float], Fit | None]:
        """Bytes on the device by stage, and the tiles to decode in."""
        weights = self.weights(way)
        everything = sum(weights.values())

        def beside(*names: str) -> float:
            return max(weights[name] for name in names) if way.offload else everything

        fit = self.tiles(room - beside("ae"))
        decode = fit.bytes if fit is not None else self.decoding.peak if self.decoding is not None else 0
        found = {
            "text": beside(*TEXT_ENCODERS) + TEXT_WORK * (text_length(self.run.sections["t5"]) / 512),
            "denoise": beside("model") - self.modulation(way) + activations_of(self.run, self.plan),
            "decode": beside("ae") + (decode or 0),
        }
        if self.encoding is not None:
            found["references"] = beside("ae") + self.encoding.peak
        if way.streams:  # what there is room for stays
            least = {"denoise": found["denoise"] - self.movable(way), "text": found["text"] - 0.85 * weights["t5"]}
            found |= {stage: min(found[stage], max(room, count)) for stage, count in least.items()}
        return found, fit

    def movable(self, way: Way) -> float:
        """Bytes of the transformer's blocks that need not be there at once: all but two."""
        blocks = self.run.model.blocks_in_order()
        away = {id(p) for layer in self.run.model.modulation_layers().values() for p in layer.parameters()}
        kept = away if self.run.cfg.precompute else set()
        sizes = [sum(p.numel() for p in block.parameters() if id(p) not in kept) for block in blocks]
        if len(sizes) < 3:
            return 0.0
        share = (sum(sizes) - 2 * max(sizes)) / sum(p.numel() for p in self.run.model.parameters() if id(p) not in kept)
        return share * (self.weights(way)["model"] - self.modulation(way))

    def forward_seconds(self, card: Card) -> float:
        """Of the video model, on one sample."""
        model, tokens, texts = self.run.model, self.plan.tokens, text_length(self.run.sections["t5"])
        once, twice = model.forward_flops(tokens, texts), model.forward_flops(2 * tokens, 2 * texts)
        attention = max((twice - 2 * once) / 2, 0)  # what grows with the square of the tokens
        moved = model.activation_bytes(tokens + texts, 1, self.run.dtype) * len(model.blocks_in_order())
        return card.forward_seconds(once - attention, attention, moved)

    def seconds(self, way: Way, card: Card, fit: Fit | None) -> dict[str, float]:
        """By stage, of one sample."""
        weights, forward = self.weights(way), self.forward_seconds(card)
        copied = {name: card.copy_seconds(count) if way.offload else 0.0 for name, count in weights.items()}
        denoise = copied["model"] + forward * self.plan.forwards
        if way.streams:  # while the card computes; the branches of a step share what comes
            full = self.peaks(dataclasses.replace(way, streams=False), card.room)[0]["denoise"]
            coming = card.copy_seconds(max(full - card.room, 0.0))
            steps = self.plan.num_steps * (self.plan.windows.count if self.plan.windows is not None else 1)
            denoise = copied["model"] + max(forward * self.plan.forwards, coming * steps)
        found = {"text": TEXT_SECONDS + copied["t5"] + copied["clip"], "denoise": denoise, "decode": copied["ae"]}
        twice = 2.0 if self.plan.keeps_region else 1.0
        if self.decoding is not None:
            tiling, size = self.ae.tiling, self.plan.latent_size
            more = fit.tiling.work(size) / tiling.work(size) if fit is not None and tiling is not None else 1.0
            more *= window_work(self.ae, self.plan.num_frames, self.plan.whole_latent) if self.plan.windows else 1.0
            found["decode"] += twice * more * card.network_seconds(self.decoding.flops, self.decoding.written)
        if self.encoding is not None:
            found["references"] = twice * card.network_seconds(self.encoding.flops, self.encoding.written)
        return found

    def host(self, way: Way) -> float:
        """Bytes of the machine's memory: weights that wait there, or the largest file while it is loaded; and a part
        of a video."""
        weights = self.weights(way)
        frames = self.plan.num_frames * self.plan.height * self.plan.width * 3
        return (sum(weights.values()) if way.offload or way.streams else max(weights.values())) + 2.0 * frames

    def ways(self) -> Iterator[Way]:
        """This run's own, then others that need less, those with the same results first."""
        yield self.own
        if not self.own.offload:
            yield Way("--offload True", offload=True)
        streams = "blocks" in _choices_of("offload")
        if streams and not self.own.streams:
            yield Way("--offload blocks", offload=True, streams=True)
        takes = {name for name in ("model", "t5") if getattr(self.run.sections[name], "quantize", "") is None}
        for kind in KINDS if "model" in takes else ():
            flags = f"--offload True --model.quantize {kind}"
            yield Way(flags, offload=True, quantize=kind)
            if "t5" in takes:
                yield Way(f"{flags} --t5.quantize {kind}", offload=True, quantize=kind, t5_quantize=kind)

    def on(self, card: Card) -> Outlook:
        """The first way that fits a card; this run's own if none does."""
        first = None
        for way in self.ways():
            outlook = self.outlook(way, card)
            first = first or outlook
            if outlook.fits:
                return outlook
        assert first is not None
        return first

    def outlook(self, way: Way, card: Card) -> Outlook:
        """A way on a card."""
        peaks, fit = self.peaks(way, card.room)
        tiles = fit.tiling.describe() if fit is not None and fit.changed else ""
        fits = max(peaks.values()) <= card.room
        if self.run.dtype == torch.bfloat16 and card.dtype != "bf16":
            way = dataclasses.replace(way, flags=f"{way.flags} --dtype {card.dtype}".strip())
        return Outlook(way, peaks, self.seconds(way, card, fit), tiles, fits)


def _choices_of(key: str) -> Sequence[object]:
    """Values that the type of a key names."""
    hint = get_type_hints(InferenceOptions)[key]
    return [value for part in (hint, *get_args(hint)) for value in (*get_args(part), part)]
