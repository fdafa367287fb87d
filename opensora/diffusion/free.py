"""Conditions that give anything anywhere: frames at any place, a region of all frames, a clip of any length.

Other than a tuple of :class:`opensora.diffusion.spans.Span`, such a condition does not say by itself what is given:
when sampling, each sample's references do (:mod:`opensora.diffusion.placing`); when training, it is drawn. What may be
drawn comes in a few *layouts*, each of which gives as many latents for every clip of a length. So each can be encoded
beforehand and kept (in a cache, in memory) under a name of its own, while where it lies follows from the clip's row.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora.datasets.runs import FrameRun
from opensora.datasets.transforms import in_model_range
from opensora.diffusion.placing import Located, Reference, locate_all
from opensora.diffusion.spans import Span
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError

Layout = tuple[int | None, ...]
"""Lengths of given runs, as in :attr:`Span.groups`: None for a picture, else groups of frames."""


@dataclass(frozen=True)
class Rectangle:
    """A part of the picture, its sides as shares of height and width.

    Attributes:
        top, left, bottom, right: its sides.
        inside: whether what lies inside is kept, or what lies outside.
    """

    top: float
    left: float
    bottom: float
    right: float
    inside: bool

    def kept(self, height: int, width: int) -> Tensor:
        """Which pixels are kept, bool ``[height, width]``."""
        rows = (torch.arange(height) + 0.5) / height
        columns = (torch.arange(width) + 0.5) / width
        inner = ((rows >= self.top) & (rows < self.bottom))[:, None] & ((columns >= self.left) & (columns < self.right))
        return inner if self.inside else ~inner


@dataclass(frozen=True)
class Given:
    """What is given of one clip.

    Attributes:
        spans: runs of latent frames, none of which overlap.
        region: which part of them; None gives whole frames.
    """

    spans: tuple[Span, ...]
    region: Rectangle | None = None


class FreeCondition(ABC):
    """A condition of which each sample says what it gives."""

    @property
    def in_windows(self) -> bool:
        """Whether it can be of a video that is made in windows."""
        return False

    @abstractmethod
    def layouts(self, latent_frames: int, is_causal: bool) -> Sequence[Layout]:
        """What training may draw of videos of a length; each leaves something to generate. None fit short videos."""

    @abstractmethod
    def draw(self, layout: Layout, latent_frames: int, is_causal: bool, rng: random.Random) -> Given:
        """Places for a layout (or the region that it stands for)."""

    @abstractmethod
    def locate(self, references: Sequence[Reference], spec: LatentSpec, num_frames: int, window: int) -> list[Located]:
        """What the references of a sample give.

        Args:
            references: of the sample.
            spec: of the autoencoder.
            num_frames: of the video.
            window: frames of it that are made at once.

        Raises:
            UserError: too many or too few of them, too short, or in the wrong place; says which would be right.
        """


@dataclass(frozen=True)
class Anywhere(FreeCondition):
    """Pictures and clips at any places in time."""

    @property
    def in_windows(self) -> bool:
        """Each window has what lies in it."""
        return True

    def layouts(self, latent_frames: int, is_causal: bool) -> Sequence[Layout]:
        """One picture, two, two clips (to join), a clip and a picture."""
        groups = max(1, latent_frames // 8)
        every: list[Layout] = [(None,), (None, None), (groups, groups), (groups, None)]
        return [layout for layout in every if sum(_lengths(layout, is_causal)) < latent_frames]

    def draw(self, layout: Layout, latent_frames: int, is_causal: bool, rng: random.Random) -> Given:
        """Any places, in any order; the ends of the video, where given frames usually lie, in half of the draws."""
        order = rng.sample(range(len(layout)), len(layout))
        lengths = _lengths(layout, is_causal)
        free = latent_frames - sum(lengths)
        gaps = sorted(rng.choices(range(free + 1), k=len(layout)))
        if rng.random() < 0.5:
            gaps[0] = 0
        if rng.random() < 0.5:
            gaps[-1] = free
        begins, before = [0] * len(layout), 0
        for gap, part in zip(gaps, order):
            begins[part] = gap + before
            before += lengths[part]
        return Given(tuple(Span(begin, part, groups) for part, (begin, groups) in enumerate(zip(begins, layout))))

    def locate(self, references: Sequence[Reference], spec: LatentSpec, num_frames: int, window: int) -> list[Located]:
        """Each at the place that it says."""
        return locate_all(references, spec, num_frames)


@dataclass(frozen=True)
class Extension(FreeCondition):
    """A clip at one end of the video, the rest of which is made.

    Attributes:
        left: make what comes before the clip, which is the end of the video then; otherwise what comes after it.
    """

    left: bool

    @property
    def in_windows(self) -> bool:
        """A beginning lies in the first of them."""
        return not self.left

    def layouts(self, latent_frames: int, is_causal: bool) -> Sequence[Layout]:
        """Clips of one group of frames up to half of the video."""
        most = self.most_groups(latent_frames, is_causal)
        return [(groups,) for groups in sorted({1, most // 2, most}) if 0 < groups <= most]

    def draw(self, layout: Layout, latent_frames: int, is_causal: bool, rng: random.Random) -> Given:
        """Always the end of the video."""
        return Given((Span("tail" if self.left else "head", 0, layout[0]),))

    def locate(self, references: Sequence[Reference], spec: LatentSpec, num_frames: int, window: int) -> list[Located]:
        """As much of the clip as half of the video takes, from the end that the video goes on at."""
        (clip,) = _plain(references, 1, "one clip")
        ratio, lead = spec.compression[0], int(spec.is_causal)
        groups = (clip.frames - lead) // ratio
        if groups < 0 or (groups == 0 and not lead and not clip.is_picture):
            raise UserError(f"reference too short: {clip.name} has {clip.frames} frames, at least {ratio} are needed")
        groups = min(groups, self.most_groups(spec.latent_size(window, 1, 1)[0], spec.is_causal))
        if self.left:
            return [Located(Span("tail", 0, groups or None), "head")]
        return [Located(Span("head", 0, groups or None), "tail")]

    def most_groups(self, latent_frames: int, is_causal: bool) -> int:
        """Groups of frames of the longest clip, which is half of the video."""
        return (latent_frames - 1) // 2 if is_causal else latent_frames // 2


@dataclass(frozen=True)
class Region(FreeCondition):
    """A part of the picture in all frames, of a clip as long as the video."""

    def layouts(self, latent_frames: int, is_causal: bool) -> Sequence[Layout]:
        """All frames, with what lies outside of a rectangle, or inside."""
        groups = latent_frames - int(is_causal)
        return [(groups,), (groups,)] if latent_frames > 1 else []

    def draw(self, layout: Layout, latent_frames: int, is_causal: bool, rng: random.Random) -> Given:
        """A rectangle of a quarter to three quarters of each side; in a quarter of the draws a strip across."""
        strip, across = rng.random() < 0.25, rng.random() < 0.5
        height, width = (rng.uniform(0.25, 0.75) for _ in range(2))
        if strip:
            height, width = (1.0, width) if across else (height, 1.0)
        top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
        inside = rng.random() < 0.5
        return Given((Span("head", 0, layout[0]),), Rectangle(top, left, top + height, left + width, inside))

    def locate(self, references: Sequence[Reference], spec: LatentSpec, num_frames: int, window: int) -> list[Located]:
        """All frames of the first reference; the second one is the mask."""
        for reference in _plain(references, 2, "a clip or picture, and a mask"):
            if not reference.is_picture and reference.frames < num_frames:
                raise UserError(
                    f"reference too short: {reference.name} has {reference.frames} frames, the video {num_frames}"
                )
        return [Located(Span("head", 0, spec.latent_size(num_frames, 1, 1)[0] - int(spec.is_causal)))]


def _plain(references: Sequence[Reference], count: int, words: str) -> Sequence[Reference]:
    """The references, known to be ``count`` and to say no place."""
    placed = next((reference.placed_name for reference in references if reference.place is not None), None)
    if placed is not None:
        raise UserError(f"{placed}: places in the video are for cond_type frames")
    if len(references) != count:
        names = ", ".join(reference.name for reference in references)
        raise UserError(f"{words} is needed, not {len(references)} references ({names})")
    return references


def _lengths(layout: Iterable[int | None], is_causal: bool) -> list[int]:
    return [Span("head", 0, groups).latent_frames(is_causal) for groups in layout]


@dataclass(frozen=True)
class DrawnPart:
    """A layout of a condition, of clips of a length: a :class:`opensora.datasets.runs.ClipPart`.

    Attributes:
        cond_type: name of the condition.
        condition: itself.
        number: of the layout.
        latent_frames: of the clips.
        spec: of the autoencoder.
    """

    cond_type: str
    condition: FreeCondition
    number: int
    latent_frames: int
    spec: LatentSpec

    @property
    def name(self) -> str:
        """``frames_0``, ...; the layout of that number for the clip's length."""
        return f"{self.cond_type}_{self.number}"

    def given(self, row: int) -> Given:
        """What it gives of the clip of a row; always the same."""
        causal = self.spec.is_causal
        layout = self.condition.layouts(self.latent_frames, causal)[self.number]
        rng = random.Random(f"{self.name}/{self.latent_frames}/{row}")
        return self.condition.draw(layout, self.latent_frames, causal, rng)

    def pieces(self, row: int, clip: Tensor) -> list[Tensor]:
        """The given runs, what is not of the region filled in."""
        given, ratio = self.given(row), self.spec.compression[0]
        if given.region is not None:
            clip = filled(in_model_range(clip), given.region.kept(*clip.shape[-2:])[None])
        return [span.pixel_run(self.spec.is_causal, ratio).cut(clip) for span in given.spans]

    def placed(self, row: int, latents: Tensor, height: int, width: int) -> "PlacedLatents":
        """Latents ``[C, t, h, w]`` of the pieces one after another, with their places; sizes in pixels."""
        given = self.given(row)
        lengths = [span.latent_frames(self.spec.is_causal) for span in given.spans]
        cells = None if given.region is None else kept_cells(given.region.kept(height, width)[None], self.spec)
        return PlacedLatents(given.spans, latents.split(lengths, dim=1), cells)


@dataclass(frozen=True)
class PlacedLatents:
    """Reference latents of one sample, and where they lie.

    Attributes:
        spans: of each.
        latents: each ``[C, t, h, w]``.
        cells: which latent pixels of them are given, bool ``[1 or t, h, w]``; None gives whole frames.
        whole: of a region, the same latents of the reference as it is, which has been seen in full; they are put back
            into what is sampled, and never given to the model.
    """

    spans: tuple[Span, ...]
    latents: Sequence[Tensor]
    cells: Tensor | None = None
    whole: Sequence[Tensor] = ()

    def exact(self) -> "PlacedLatents":
        """The same, of latents that have seen the reference in full."""
        return replace(self, latents=self.whole or self.latents, whole=())

    def put_back(self, z: Tensor) -> None:
        """Replace what is given in sampled latents ``[C, T, h, w]``, in place: pictures, and what is kept of a region,
        by their exact latents. Clips stay as drawn, so that the join stays smooth."""
        for span, latents in zip(self.spans, self.whole or self.latents):
            if span.groups is None:
                z[:, FrameRun(span.at, 1).place(z.shape[1])] = latents.to(z)
            elif self.cells is not None:
                z.copy_(torch.where(self.cells.to(z.device), latents.to(z), z))

    def within(self, begin: int, end: int) -> "PlacedLatents | None":
        """What lies in the latent frames from ``begin`` to ``end``, counted from ``begin``; None if there is nothing.
        Of places by number, and of whole frames."""
        spans, parts = [], []
        for span, latents in zip(self.spans, self.latents):
            first = 0 if isinstance(span.at, str) else span.at
            part = latents[:, max(begin - first, 0) : max(end - first, 0)]
            if part.shape[1]:
                spans.append(replace(span, at=max(first - begin, 0)))
                parts.append(part)
        return PlacedLatents(tuple(spans), parts) if spans else None


def filled(clip: Tensor, kept: Tensor) -> Tensor:
    """A clip ``[3, T, H, W]`` with the mean colour of what is kept of it in place of the rest, which nothing is seen of
    then; the encoder looks far, and a colour of the clip disturbs the latents beside it less than any other.

    Args:
        clip: in [-1, 1].
        kept: bool ``[1 or T, H, W]``.
    """
    kept = kept.to(clip.device)
    weight = kept.to(clip).expand(clip.shape[1:])
    colour = (clip * weight).sum((1, 2, 3), keepdim=True) / weight.sum().clamp_min(1)
    return torch.where(kept, clip, colour)


def kept_cells(kept: Tensor, spec: LatentSpec) -> Tensor:
    """Latent pixels of which nothing is to be made: one that covers any pixel that is not kept is made.

    Args:
        kept: bool ``[T, H, W]``: one mask for all frames (T = 1), or one for each; H and W multiples of the
            compression.
        spec: of the autoencoder.

    Returns:
        bool ``[t, H / height ratio, W / width ratio]``.
    """
    ratio, rows, columns = spec.compression
    cells = kept.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).all(4).all(2)
    if len(cells) == 1:
        return cells
    if spec.is_causal:  # the first frame has a latent of its own
        cells = torch.cat([cells[:1].expand(ratio - 1, -1, -1), cells])
    return cells.unflatten(0, (-1, ratio)).all(1)
