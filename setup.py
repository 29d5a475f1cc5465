"""Packaging. kernels/, layer_specs/ and tools/ stand at the top level and import as megatron_hybrid.*."""

import re
from pathlib import Path

from setuptools import setup

FOLDERS = {
    "megatron_hybrid": "megatron_hybrid",
    "megatron_hybrid.modules": "megatron_hybrid/modules",
    "megatron_hybrid.checkpoint": "megatron_hybrid/checkpoint",
    "megatron_hybrid.data": "megatron_hybrid/data",
    "megatron_hybrid.parallel": "megatron_hybrid/parallel",
    "megatron_hybrid.planning": "megatron_hybrid/planning",
    "megatron_hybrid.training": "megatron_hybrid/training",
    "megatron_hybrid.kernels": "kernels",
    "megatron_hybrid.layer_specs": "layer_specs",
    "megatron_hybrid.tools": "tools",
    "megatron_hybrid.tools.corpus": "tools/corpus",
    "megatron_hybrid.tools.convert": "tools/convert",
    "megatron_hybrid.tools.gpu_bench": "tools/gpu_bench",
    "megatron_hybrid.tools.bench_kernels": "tools/bench_kernels",
    "megatron_hybrid.tools.tune_kernels": "tools/tune_kernels",
}
VERSION = re.search(r'__version__ = "(.+)"', Path("megatron_hybrid/__init__.py").read_text()).group(1)  # type: ignore[union-attr]

setup(
    name="megatron-hybrid",
    version=VERSION,
    description="Train OLMo-Hybrid (Gated DeltaNet + attention) models on NVIDIA Megatron-Core",
    python_requires="==3.12.*",  # megatron-core 0.19.2 ships a compiled helper for cp312 only
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={"megatron_hybrid": ["py.typed", "known_flags.txt"]},
    install_requires=[
        "torch==2.11.0",
        "triton==3.6.0",
        "megatron-core==0.19.2",
        "transformers==5.23.0",
        "numpy==2.3.5",  # 2.4 and later break triton 3.6's interpreter
        "psutil==7.2.2",  # needed by Megatron's torch_dist save, but not declared there
        "packaging==26.3",
        "safetensors==0.8.0",
        "tokenizers==0.23.3",
        "sentencepiece==0.2.3",
        "tensorboard==2.21.0",
        "zstandard==0.25.0",
        "backports.zstd==1.8.0",  # reads zstd in bounded steps and tells a truncated file; Python 3.14 has it built in
        "isal==1.9.1",
        "msgspec==0.22.0",
        "xxhash==4.1.0",
        "fastokens==0.3.5",
        "fsspec==2026.9.0",
        "tqdm==4.70.1",
        "matplotlib==3.11.2",
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]==2.20.2"],
        "data": ["pyarrow==26.0.1", "s3fs==2026.9.0", "tiktoken==0.14.0", "gigatoken==0.10.0"],
        "ray": ["ray==2.60.0"],  # 240 MB; preprocess --engine ray
        "clean": ["datatrove==0.10.1", "spacy==3.8.18"],  # spacy: English words without a model to fetch; tools.clean
        "dev": ["setuptools==81.0.0", "pytest==9.2.0", "moto[server]==5.2.5", "ruff==0.17.6", "mypy==2.4.1"],
    },
)
