"""What the plugin is measured against: Hugging Face's model and OLMo-core's, forward and backward, no optimizer.

Megatron-Core's own GDN layer is in peer_spec.py.
"""

from __future__ import annotations

import inspect
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo.utils

from megatron_hybrid.flops import Sizes, model_parameters
from megatron_hybrid.tools.gpu_bench.fla import UNCHECKED, allow_fla_backward, compile_side_by_side
from megatron_hybrid.tools.gpu_bench.harness import batches, free, synchronize


class Peer:
    """A model in bf16 that is stepped without an optimizer.

    Args:
        args: Megatron's arguments; sizes and batch are theirs.
        tokens: ids [n] int64.
        model: in bf16, on its device.
        loss: (ids [rows, length], labels, the same shifted by one) to the mean loss of the global batch, of which
            these rows are a part.
        what: which kernels run, for the table.
        compiled: parts of the model are under torch.compile.

    Raises:
        ValueError: the model has more or fewer parameters than ours of these arguments.
    """

    def __init__(
        self,
        args: Namespace,
        tokens: torch.Tensor,
        model: torch.nn.Module,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        what: str,
        compiled: bool = False,
    ) -> None:
        ours = model_parameters(Sizes.from_args(args), args.hybrid_layer_pattern)
        theirs = sum(p.numel() for p in model.parameters())
        if theirs != ours:
            raise ValueError(f"{theirs:,} parameters, ours has {ours:,}: not the same model")
        self.model, self.loss, self.what, self.compiled = model, loss, what, compiled
        # A function that is compiled anew too often would go on uncompiled with a warning that the worker hides.
        torch._dynamo.config.fail_on_recompile_limit_hit = compiled
        self.graphs_before = _graphs()
        self.microbatches = args.global_batch_size // args.micro_batch_size
        self.data = batches(tokens, args.seq_length, args.micro_batch_size)

    def step(self) -> dict[str, float]:
        """As `Trained.step`, without an optimizer."""
        synchronize()
        began = time.perf_counter()
        self.model.zero_grad()
        total = torch.zeros((), device=_device())
        for _ in range(self.microbatches):
            batch = next(self.data)
            loss = self.loss(batch["tokens"].to(_device()), batch["labels"].to(_device()))
            loss.backward()
            total += loss.detach()
        synchronize()
        ms = (time.perf_counter() - began) * 1e3
        return {"loss": float(total), "norm": float("nan"), "ms": ms, "backward_ms": ms}

    def note(self) -> str:
        """What ran, for the table, once it has been stepped.

        Raises:
            RuntimeError: torch.compile was asked for and compiled nothing.
        """
        if not self.compiled:
            return self.what
        if not (graphs := _graphs() - self.graphs_before):
            raise RuntimeError("torch.compile compiled nothing (TORCHDYNAMO_DISABLE?): these would be eager's times")
        return f"{graphs} graphs of torch.compile; {self.what}"

    def close(self) -> None:
        self.__dict__.clear()
        torch._dynamo.config.fail_on_recompile_limit_hit = False
        torch.compiler.reset()  # compiled blocks hold the model
        free()


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepare_fla() -> None:
    if torch.cuda.is_available() and find_spec("fla") is not None:
        allow_fla_backward()
        compile_side_by_side()


def huggingface(args: Namespace, tokens: torch.Tensor) -> Peer:
    """transformers' OlmoHybridForCausalLM.

    Raises:
        ImportError: a package is missing.
    """
    try:
        from transformers import OlmoHybridConfig, OlmoHybridForCausalLM
        from transformers.models.olmo_hybrid import modeling_olmo_hybrid
    except ImportError as error:
        raise ImportError(f"no package {error.name}: pip install transformers") from error
    _prepare_fla()
    kinds = {"G": "linear_attention", "*": "full_attention"}
    config = OlmoHybridConfig(
        vocab_size=args.padded_vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=len(args.hybrid_layer_pattern),
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_attention_heads,
        max_position_embeddings=args.max_position_embeddings,
        layer_types=[kinds[symbol] for symbol in args.hybrid_layer_pattern],
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
    with _device():
        model = OlmoHybridForCausalLM(config).to(torch.bfloat16)
    model.config.use_cache = False
    microbatches = args.global_batch_size // args.micro_batch_size

    def loss(ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss / microbatches  # it shifts the labels itself

    parts = {
        "recurrence": modeling_olmo_hybrid.torch_chunk_gated_delta_rule,
        "convolution": modeling_olmo_hybrid.causal_conv1d_fn,
    }
    chosen = {name: _implementation(function) for name, function in parts.items()}
    what = ", ".join(f"{name} of {package}" for name, package in chosen.items())
    checked = f"; {UNCHECKED}" if "fla" in chosen.values() else ""
    return Peer(args, tokens, model, loss, f"no optimizer step; {what}; norms and loss of PyTorch{checked}")


def _implementation(function: Callable[..., object]) -> str:
    """The package whose function transformers calls: its own PyTorch code where a kernel's package does not import."""
    chosen = inspect.getclosurevars(function).nonlocals.get("implementation", function)
    package = chosen.__module__.split(".")[0]
    return "PyTorch" if package == "transformers" else package


def olmo_core(args: Namespace, tokens: torch.Tensor, compiled: bool) -> Peer:
    """OLMo-core's Transformer as its script for this model builds it, but pre-norm GDN blocks, as in the released one.

    Weights are bf16, as FSDP gives them to its forward; attention is PyTorch's, since flash-attn may be missing.

    Args:
        compiled: each block by torch.compile, as `compile_model=True` does there.

    Raises:
        ImportError: a package is missing.
    """
    model = olmo_core_model(args, "meta")
    _prepare_fla()
    if compiled:
        model.apply_compile()
    model.init_weights(max_seq_len=args.seq_length, device=_device())
    model = model.to(torch.bfloat16)
    count = torch.tensor(float(args.seq_length * args.global_batch_size), device=_device())

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = model(
            ids,
            labels=labels,
            loss_reduction="sum",
            z_loss_multiplier=args.z_loss,
            loss_div_factor=count,
            return_logits=False,
        )
        return found.loss

    import fla

    what = f"no optimizer step; fla {fla.__version__}; attention and loss of PyTorch; {UNCHECKED}"
    return Peer(args, tokens, model, loss, what, compiled)


def olmo_core_model(args: Namespace, device: str) -> Any:
    """OLMo-core's model of these sizes, fp32, not initialized.

    Raises:
        ImportError: a package is missing.
    """
    try:
        from olmo_core.nn.attention import AttentionBackendName
        from olmo_core.nn.attention.flash_linear_attn_api import has_fla
        from olmo_core.nn.attention.recurrent import GatedDeltaNetConfig
        from olmo_core.nn.feed_forward import FeedForwardConfig
        from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig
    except ImportError as error:
        raise ImportError(f"no package {error.name}: pip install ai2-olmo-core==3.0.0") from error
    if not has_fla():
        raise ImportError("no package fla: pip install flash-linear-attention==0.6.0 einops")
    config = TransformerConfig.llama_like(
        d_model=args.hidden_size,
        vocab_size=args.padded_vocab_size,
        n_layers=len(args.hybrid_layer_pattern),
        n_heads=args.num_attention_heads,
        qk_norm=True,
        layer_norm_eps=1e-6,
        block_name=TransformerBlockType.reordered_norm,
        attn_backend=AttentionBackendName.torch,
        feed_forward=FeedForwardConfig(hidden_size=args.ffn_hidden_size, bias=False),
    )
    attention = config.block
    recurrent = attention.replace(
        name=TransformerBlockType.default,
        sequence_mixer=GatedDeltaNetConfig(
            n_heads=args.linear_num_key_heads,
            n_v_heads=args.linear_num_value_heads,
            head_dim=args.linear_key_head_dim,
            expand_v=args.linear_value_head_dim / args.linear_key_head_dim,
            conv_size=args.linear_conv_kernel_dim,
        ),
    )
    config.block, config.block_pattern = {"G": recurrent, "*": attention}, list(args.hybrid_layer_pattern)
    return config.build(init_device=device)
