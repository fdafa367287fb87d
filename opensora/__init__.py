"""Train and run text- and image-to-video diffusion models.

Example::

    from opensora import VideoPipeline, save_video

    pipe = VideoPipeline.from_pretrained("demo")
    save_video(pipe("a red circle moving right", seed=42).frames[0], "circle.mp4", fps=8)

Importing the package imports nothing else; names of it are looked up when they are first used (PEP 562).
"""

from typing import TYPE_CHECKING

from opensora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from opensora.diffusion.pipeline import SampleResult, VideoPipeline
    from opensora.utils.errors import UserError
    from opensora.utils.video import save_image, save_video

__all__ = ["SampleResult", "UserError", "VideoPipeline", "save_image", "save_video"]

_PLACES = {
    "SampleResult": "diffusion.pipeline",
    "VideoPipeline": "diffusion.pipeline",
    "UserError": "utils.errors",
    "save_image": "utils.video",
    "save_video": "utils.video",
}
__getattr__ = lazy_names(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
