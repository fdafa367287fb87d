"""Decoding of only the frames that training asks for (PyAV)."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError


class BrokenMediaError(RuntimeError):
    """A clip or picture of the dataset cannot be used; the message names file and reason."""


def read_frames(path: str | Path, indices: Sequence[int], fps: float | None = None) -> np.ndarray:
    """Decode chosen frames of a video.

    Seeks to the key frame before the first wanted frame and stops after the last one.

    Args:
        path: video file.
        indices: frame numbers from 0, non-decreasing.
        fps: frames per second if known, to find the time stamp of a frame; read from the container otherwise.

    Returns:
        uint8 ``[len(indices), H, W, 3]``, RGB.

    Raises:
        BrokenMediaError: unreadable file, or fewer frames than asked for.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # loader workers are the parallelism; codec threads would fight them
            rate = float(stream.average_rate or fps or 0)
            found = _decode(container, stream, list(indices), rate)
    except (FFmpegError, OSError, IndexError, ValueError) as error:
        raise BrokenMediaError(f"{path}: cannot be decoded ({error})") from error
    if len(found) < len(set(indices)):
        missing = sorted(set(indices) - set(found))
        raise BrokenMediaError(f"{path}: frame {missing[0]} of the {len(set(indices))} wanted ones is not there")
    return np.stack([found[i] for i in indices])


def _decode(
    container: "av.container.InputContainer", stream: "av.VideoStream", indices: list[int], rate: float
) -> dict[int, np.ndarray]:
    """Frames by number. Frame numbers come from time stamps after a seek, from counting otherwise."""
    wanted, last = set(indices), indices[-1]
    start = stream.start_time or 0
    time_base = float(stream.time_base or 0)
    seekable = rate > 0 and time_base > 0 and indices[0] > 0
    if seekable:
        container.seek(start + int(indices[0] / rate / time_base), stream=stream, backward=True)
    found: dict[int, np.ndarray] = {}
    for count, frame in enumerate(container.decode(stream)):
        index = round((frame.pts - start) * time_base * rate) if seekable and frame.pts is not None else count
        if index in wanted and index not in found:
            found[index] = frame.to_ndarray(format="rgb24")
        if index >= last:
            break
    return found
