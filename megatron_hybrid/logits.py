"""Logits of a Megatron checkpoint on given tokens, on one rank.

    python -m megatron_hybrid.logits --preset olmo-hybrid-tiny --load CHECKPOINT ... --tokens IN --output OUT

IN is a safetensors file with "tokens" int64 [B, T]; OUT gets "logits" fp32 [B, T, padded vocabulary]. All other flags
are those that the checkpoint was trained with; parallel sizes are 1, whatever they were then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.flags import FlagError
from megatron_hybrid.pretrain import fail, prepare, provide_model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_hybrid.logits", allow_abbrev=False, add_help=False)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if not own.tokens.is_file():
        fail(FlagError(f"--tokens {own.tokens}: no such file"))
    args = prepare([*rest, "--skip-train", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"])
    if not args.load:
        fail(FlagError("--load: missing; give the checkpoint folder that training saved to"))

    import torch
    from megatron.training import training
    from megatron.training.checkpointing import load_checkpoint
    from safetensors.torch import load_file, save_file

    training.initialize_megatron()
    model = training.get_model(provide_model, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    device = next(model[0].parameters()).device
    tokens = load_file(own.tokens)["tokens"].to(device)
    model[0].eval()
    with torch.no_grad():
        logits = model[0](tokens, torch.arange(tokens.shape[1], device=device).expand_as(tokens), None)
    save_file({"logits": logits.float().cpu().contiguous()}, own.output)


if __name__ == "__main__":
    main()
