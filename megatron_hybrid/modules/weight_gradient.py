"""Gradient accumulation fusion without NVIDIA's apex: weight gradients added to `main_grad` by the GEMM itself.

On unless --no-gradient-accumulation-fusion is given. Transformer Engine's modules do that on their own; Megatron's
linear layers, the output layer among them, ask for apex's extension `fused_weight_gradient_mlp_cuda`. Its two functions
are here, made of Transformer Engine's GEMM.
"""

from __future__ import annotations

import types
from importlib.util import find_spec

import torch
from megatron.core.tensor_parallel import layers


def stand_in_for_apex() -> None:
    """Give Megatron's layers the two functions, where apex did not and Transformer Engine can. Safe to call again."""
    if layers._grad_accum_fusion_available or find_spec("transformer_engine") is None:
        return
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def add_weight_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_output^T inputs, of [n, out] and [n, in].

    Products are summed in fp32. Into bf16 they are rounded before they are added, as without the fusion.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(inputs, grad_output, out_dtype=main_grad.dtype, accumulate=True, layout="NT", out=main_grad, grad=True)
