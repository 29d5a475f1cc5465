"""Stack spec of OLMo 3, the transformer OLMo-Hybrid is compared with: every layer is a `*`.

Three of four layers attend to a sliding window, every fourth to everything:

    --spec megatron_hybrid.layer_specs.olmo3 olmo3_stack_spec
    --hybrid-layer-pattern '****' --window-size 4095,0 --window-attn-skip-freq 4

Hugging Face's `sliding_window` = 4096 counts the query itself; Megatron's left window (4095) does not.
"""

from __future__ import annotations

from megatron_hybrid.layer_specs.olmo_hybrid import build_stack_spec

#: Reordered norm and full-width QK-norm as in OLMo-Hybrid's attention layers; the pattern has no `G`.
olmo3_stack_spec = build_stack_spec()
