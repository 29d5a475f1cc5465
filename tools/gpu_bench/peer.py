"""What the plugin is measured against: Hugging Face's model, and (peer_spec.py) Megatron-Core's GDN layer."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_hybrid.tools.gpu_bench.fla import allow_fla_backward, compile_side_by_side
from megatron_hybrid.tools.gpu_bench.harness import batches, free, synchronize


class HuggingFace:
    """transformers' OlmoHybridForCausalLM of the same sizes in bf16: forward and backward, no optimizer."""

    def __init__(self, args: Any, tokens: torch.Tensor) -> None:
        from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

        if torch.cuda.is_available():
            allow_fla_backward()
            compile_side_by_side()
        kinds = {"G": "linear_attention", "*": "full_attention"}
        pattern = args.hybrid_layer_pattern
        config = OlmoHybridConfig(
            vocab_size=args.padded_vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.ffn_hidden_size,
            num_hidden_layers=len(pattern),
            num_attention_heads=args.num_attention_heads,
            num_key_value_heads=args.num_attention_heads,
            max_position_embeddings=args.max_position_embeddings,
            layer_types=[kinds[symbol] for symbol in pattern],
            linear_num_key_heads=args.linear_num_key_heads,
            linear_num_value_heads=args.linear_num_value_heads,
            linear_key_head_dim=args.linear_key_head_dim,
            linear_value_head_dim=args.linear_value_head_dim,
            linear_conv_kernel_dim=args.linear_conv_kernel_dim,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = "sdpa"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.device:
            self.model = OlmoHybridForCausalLM(config).to(torch.bfloat16)
        self.model.config.use_cache = False
        self.rows = args.micro_batch_size
        self.microbatches = args.global_batch_size // args.micro_batch_size
        self.data = batches(tokens, args.seq_length, args.micro_batch_size)

    def step(self) -> dict[str, float]:
        """As `Trained.step`, without an optimizer."""
        synchronize()
        began = time.perf_counter()
        self.model.zero_grad()
        loss = torch.zeros(())
        for _ in range(self.microbatches):
            tokens = next(self.data)["tokens"].to(self.device)
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        synchronize()
        ms = (time.perf_counter() - began) * 1e3
        return {"loss": float(loss), "norm": float("nan"), "ms": ms, "backward_ms": ms}

    def close(self) -> None:
        self.__dict__.clear()
        free()
