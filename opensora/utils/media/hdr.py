"""Frames of high dynamic range or wide gamut as BT.709 of standard range, which is what models and players here take.

PQ and HLG are turned to the light that a display of :data:`PEAK` would show, brought down to :data:`SDR_WHITE` by the
curve of ITU-R BT.2390, and moved to the primaries of BT.709. What lies outside these is cut off.
"""

from functools import cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SDR_WHITE = 203.0  # cd/m2 of white in an HDR signal, at 58 % of PQ and 75 % of HLG (ITU-R BT.2408)
# cd/m2 of the display that HLG is shown on, and that PQ is brought down from. That a clip says another peak is not
# regarded: white would have another brightness in each.
PEAK = 1000.0
DISPLAY_GAMMA = 2.4  # ITU-R BT.1886
CODES = 2**16

# FFmpeg's (ISO/IEC 23091-2) numbers of transfer functions and primaries
PQ, HLG = 16, 18
BT2020, DISPLAY_P3 = 9, 12
TO_BT709 = MappingProxyType(
    {  # of linear light
        BT2020: (
            (1.660491, -0.587641, -0.072850),
            (-0.124550, 1.132900, -0.008349),
            (-0.018151, -0.100579, 1.118730),
        ),
        DISPLAY_P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
    }
)
LUMA_BT2020 = np.array((0.2627, 0.6780, 0.0593), np.float32)


def range_name(transfer: int) -> str | None:
    """``"PQ"`` or ``"HLG"`` for a transfer function of high dynamic range."""
    return {PQ: "PQ", HLG: "HLG"}.get(transfer)


def needs_mapping(transfer: int, primaries: int) -> bool:
    """Whether pixels with these tags look wrong when they are shown as BT.709."""
    return transfer in (PQ, HLG) or primaries in TO_BT709


def to_sdr(rgb: NDArray[np.uint16], transfer: int, primaries: int) -> NDArray[np.uint8]:
    """Tone-map a frame.

    Args:
        rgb: ``[H, W, 3]``, full range.
        transfer, primaries: its tags; HDR without known primaries is taken for BT.2020.

    Returns:
        uint8 ``[H, W, 3]`` in BT.709.
    """
    light = _light(transfer)[rgb]  # 1 is white of the standard range
    if transfer == HLG:
        light *= (_luma(light) ** 0.2)[..., None] * np.float32(PEAK / SDR_WHITE)  # the OOTF of 1000 cd/m2
    if transfer in (PQ, HLG):
        light *= _gain(light.max(axis=-1))[..., None]
        primaries = primaries if primaries in TO_BT709 or primaries == 1 else BT2020
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    np.clip(light, 0.0, 1.0, out=light)
    return _signal()[(np.sqrt(light, out=light) * (CODES - 1)).astype(np.uint16)]


def _luma(light: NDArray[np.float32]) -> NDArray[np.float32]:
    return light @ LUMA_BT2020


@cache
def _light(transfer: int) -> NDArray[np.float32]:
    """Linear light of every 16-bit code: of the scene in [0, 1] for HLG, of the display otherwise."""
    signal = np.linspace(0.0, 1.0, CODES)
    if transfer == PQ:
        light = pq_to_nits(signal) / SDR_WHITE
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**DISPLAY_GAMMA
    return light.astype(np.float32)


@cache
def _signal() -> NDArray[np.uint8]:
    """8-bit signal of every 16-bit root of linear light."""
    root = np.linspace(0.0, 1.0, CODES)
    return np.round(root ** (2 / DISPLAY_GAMMA) * 255).astype(np.uint8)


def _gain(brightest: NDArray[np.float32]) -> NDArray[np.float32]:
    """What light is multiplied with, by the brightest channel of its pixel; both relative to white."""
    return np.interp(brightest, *_curve()).astype(np.float32)


@cache
def _curve() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain at some lights, from the electrical-electrical transfer function of BT.2390 without black lift."""
    most = nits_to_pq(np.array(PEAK))
    signal = np.linspace(0.0, 1.0, 4097)[1:]  # relative to the peak
    target = float(nits_to_pq(np.array(SDR_WHITE)) / most)
    knee = 1.5 * target - 0.5
    t = np.maximum(signal - knee, 0.0) / (1.0 - knee)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    light = pq_to_nits(signal * most) / SDR_WHITE
    mapped = pq_to_nits(np.where(signal < knee, signal, bent) * most) / SDR_WHITE
    # what is brighter than it should be becomes white
    return np.append(light, light[-1] * 1e6), np.append(mapped / light, mapped[-1] / light[-1] * 1e-6)


def pq_to_nits(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light in cd/m2 of a PQ signal in [0, 1] (SMPTE ST 2084)."""
    root = signal ** (32 / 2523)
    return 10000.0 * (np.maximum(root - 0.8359375, 0.0) / (18.8515625 - 18.6875 * root)) ** (16384 / 2610)


def nits_to_pq(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    """PQ signal in [0, 1] of light in cd/m2."""
    root = (nits / 10000.0) ** (2610 / 16384)
    return ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** (2523 / 32)
