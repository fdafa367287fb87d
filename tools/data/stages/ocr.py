"""How much of the picture is covered by text that can be read."""

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl

from opensora.config.options import Options, opt
from opensora.utils.media.pictures import read_picture
from tools.data.engine.stage import Row, Stage, Worker, check_library

DETECT_SIDE = 960  # px; larger pictures are shrunk before text is looked for, smaller ones stay


@dataclass(frozen=True, kw_only=True)
class OcrOptions(Options):
    """Share of the picture covered by readable text (RapidOCR)."""

    min_score: float = opt(0.6, "confidence from which text counts as recognised", least=0, most=1)
    min_chars: int = opt(2, "shorter finds do not count", least=1, most=1000)


class Ocr(Stage):
    """Largest share of a frame's area under recognised text, and the text itself.

    A detector alone takes windows and fences for text; here only what a reader makes sense of counts.
    """

    settings: OcrOptions

    name = "ocr"
    reads = ("clip_id", "frame_paths")
    adds: ClassVar = {"text_area": pl.Float64, "text_found": pl.String}

    def check(self) -> None:
        """RapidOCR, which brings its weights, is there."""
        check_library("rapidocr", "stage 'ocr'")
        check_library("onnxruntime", "stage 'ocr'")

    def worker(self) -> Worker:
        """Read the frames of one clip."""
        from rapidocr import RapidOCR

        one_thread = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
        size = {"Det.limit_type": "max", "Det.limit_side_len": DETECT_SIDE}
        engine = RapidOCR(params={"Global.log_level": "error", **size, **one_thread})

        def read(row: Row) -> list[Row]:
            found = [self._read(engine, read_picture(self.root / path)) for path in row["frame_paths"]]
            words = dict.fromkeys(word for _, texts in found for word in texts)
            return [{"text_area": max(area for area, _ in found), "text_found": " | ".join(words)}]

        return read

    def _read(self, engine: Any, image: np.ndarray) -> tuple[float, list[str]]:
        """Covered share of one picture, and what stands there."""
        output = engine(np.ascontiguousarray(image[..., ::-1]), use_cls=False)
        if output.boxes is None:
            return 0.0, []
        mask = np.zeros(image.shape[:2], np.uint8)
        texts = []
        for box, text, score in zip(output.boxes, output.txts, output.scores):
            if score >= self.settings.min_score and len(text.strip()) >= self.settings.min_chars:
                cv2.fillPoly(mask, [np.asarray(box, np.int32)], 1)
                texts.append(text.strip())
        return float(mask.mean()), texts
