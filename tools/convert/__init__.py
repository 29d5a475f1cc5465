"""Checkpoint conversion between Megatron torch_dist, Hugging Face safetensors and OLMo-core, and its verification.

Needs no GPU, no Megatron and no process group. Everything is streamed; nothing is unpickled; a folder appears under
its name only when it is complete. `python -m megatron_hybrid.tools.convert --help` lists the commands.
"""

from megatron_hybrid.tools.convert.to_huggingface import ExportOptions, export

__all__ = ["ExportOptions", "export"]
