"""OLMo-Hybrid (Gated DeltaNet + attention) training on NVIDIA Megatron-Core.

Importing this package has no side effects: no torch, no Megatron, no environment reads.
"""

from pathlib import Path

__version__ = "0.1.0"

_repo = Path(__file__).resolve().parent.parent
if (_repo / "setup.py").is_file() and (_repo / "layer_specs").is_dir():
    # Source checkout: kernels/, layer_specs/ and tools/ live beside this folder and are imported
    # as megatron_hybrid.kernels and so on. A top-level package named `kernels` would shadow
    # Hugging Face's package of that name.
    __path__.append(str(_repo))
