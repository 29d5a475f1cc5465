"""The Megatron flags of a model, so that what was imported can be trained without guessing."""

from __future__ import annotations

from megatron_hybrid.tools.hf_mapping import ModelConfig

SPECS = {True: "olmo_hybrid olmo_hybrid_stack_spec", False: "olmo3 olmo3_stack_spec"}  # by whether it is a hybrid
NUMBERS = (
    *("hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "num_attention_heads", "max_position_embeddings"),
)


def training_flags(config: ModelConfig) -> list[str]:
    """What `megatron_hybrid.pretrain` needs besides data, tokenizer and parallel sizes, as words."""
    preset = "olmo-hybrid-7b" if config.is_hybrid else "olmo3-7b"
    flags = {name.replace("_", "-"): str(getattr(config, name)) for name in NUMBERS}
    if not config.is_hybrid:
        flags = {name: value for name, value in flags.items() if not name.startswith("linear-")}
    flags |= {
        "hybrid-layer-pattern": config.hybrid_layer_pattern,
        "num-layers": str(len(config.layer_types)),
        "ffn-hidden-size": str(config.intermediate_size),
        "kv-channels": str(config.head_dim),
        "norm-epsilon": str(config.rms_norm_eps),
        "make-vocab-size-divisible-by": str(vocabulary_divisor(config)),
        "spec": f"megatron_hybrid.layer_specs.{SPECS[config.is_hybrid]}",
    }
    if config.rope_theta is None:
        flags["position-embedding-type"] = "none"
    else:
        flags["rotary-base"] = str(int(config.rope_theta))
    if yarn := config.rope_scaling:
        flags |= {"position-embedding-type": "yarn", "rotary-scaling-factor": str(yarn["factor"])}
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            flags[f"yarn-{name.replace('_', '-')}"] = str(yarn[name])
    words = ["--preset", preset]
    for name, value in flags.items():
        words += [f"--{name}", *value.split(" ")]
    if config.num_key_value_heads != config.num_attention_heads:
        words += ["--group-query-attention", "--num-query-groups", str(config.num_key_value_heads)]
    if config.rope_scaling:
        words.append("--no-rope-fusion")
    if not config.linear_allow_neg_eigval and config.is_hybrid:
        words.append("--no-gdn-allow-neg-eigval")
    if not config.is_hybrid:
        words += _window_flags(config)
    return words


def _window_flags(config: ModelConfig) -> list[str]:
    if config.window_size is None:
        return ["--without", "window-size", "--without", "window-attn-skip-freq"]
    freq = config.window_attn_skip_freq
    skip = ["--without", "window-attn-skip-freq"] if freq is None else ["--window-attn-skip-freq", str(freq)]
    return ["--window-size", f"{config.window_size[0]},0", *skip]


def vocabulary_divisor(config: ModelConfig) -> int:
    """A divisor under which the trainer makes exactly `vocab_size` rows of `true_vocab_size` tokens: 128 if it does."""
    if -(-config.true_vocab_size // 128) * 128 == config.vocab_size:
        return 128
    return max(d for d in range(1, config.vocab_size + 1) if -(-config.true_vocab_size // d) * d == config.vocab_size)
