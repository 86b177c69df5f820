"""Installs the three top-level folders under the one import name `minilora`, so that none clashes with another distribution."""

from pathlib import Path

from setuptools import setup

DEMO = ["gguf"]  # reads the embedded weights
PARQUET = ["pyarrow"]  # reads data sets
ROUGE = ["rouge-score"]  # the metric rougeL
TENSORBOARD = ["tensorboard"]
WANDB = ["wandb"]

FOLDERS = ["adapters", "data", "demo", "reporting", "training"]  # of minilora/

setup(
    name="minilora",
    version="0.1.0",
    description="LoRA fine-tuning of the Phi-3 family from scratch in PyTorch and Triton",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["minilora", *(f"minilora.{folder}" for folder in FOLDERS), "minilora.kernels", "minilora.phi3"],
    package_dir={"minilora": "minilora", "minilora.kernels": "kernels", "minilora.phi3": "phi3"},
    # Three more are imported and come along with these: jinja2 with torch, huggingface_hub and tqdm with tokenizers (held by
    # tests/test_imports.py).
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "safetensors>=0.5", "tokenizers>=0.21", "numpy"],
    extras_require={
        "demo": DEMO,
        "parquet": PARQUET,
        "rouge": ROUGE,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "test": [
            *DEMO,
            *PARQUET,
            *ROUGE,
            *TENSORBOARD,
            *WANDB,
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "transformers",
            "peft",
            "loralib",
            "bitsandbytes",
            "glassllm",
        ],
    },
    entry_points={"console_scripts": ["minilora = minilora.cli:main"]},
)
