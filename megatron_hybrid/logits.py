"""Logits of a Megatron checkpoint on given tokens, on one rank.

    python -m megatron_hybrid.logits --preset olmo-hybrid-tiny --load CHECKPOINT ... --tokens IN --output OUT

IN is a safetensors file with "tokens" int64 [B, T]; OUT gets "logits" fp32 [B, T, padded vocabulary]. Packed rows,
greedy tokens and losses can be asked for too: see `tools.convert.questions`. All other flags are those that the
checkpoint was trained with; parallel sizes are 1, whatever they were then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.flags import FlagError
from megatron_hybrid.pretrain import fail, prepare, provide_model
from megatron_hybrid.tools.cli import Parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m megatron_hybrid.logits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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

    from megatron_hybrid.parallel.packed import pack
    from megatron_hybrid.tools.convert.questions import answers

    training.initialize_megatron()
    model = training.get_model(provide_model, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    device = next(model[0].parameters()).device
    model[0].eval()

    def forward(tokens: torch.Tensor, lengths: list[int] | None) -> torch.Tensor:
        if lengths is None:
            return model[0](tokens, torch.arange(tokens.shape[1], device=device).expand_as(tokens), None)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        return model[0](tokens, positions, None, packed_seq_params=pack(lengths, layout="contiguous", device=device))

    with torch.no_grad():
        found = answers({name: tensor.to(device) for name, tensor in load_file(own.tokens).items()}, forward)
    save_file(found, own.output)


if __name__ == "__main__":
    main()
