"""Forward step and loss for Megatron's schedules. Letters: b batch, s sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model

from megatron_hybrid.training.batches import next_batch

LossParts = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def sum_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor, *, check_finite: bool, counted_mask: torch.Tensor | None = None
) -> LossParts:
    """Megatron's three-part loss: sum over this rank's tokens, their number, and what to report.

    Megatron divides: by the tokens of all microbatches and data-parallel ranks under --calculate-per-token-loss
    (which the presets set), else by each microbatch's own.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        losses: [b, s] cross-entropy of each token.
        counted_mask: [b, s], 1 where a token counts in the number; None: as in the loss.
        check_finite: stop the run on NaN or infinity, after Megatron's rerun machine has looked at it.
    """
    mask = loss_mask.view(-1).float()
    total = torch.sum(losses.view(-1).float() * mask)
    count = (mask if counted_mask is None else counted_mask).sum().detach().to(torch.int)
    if check_finite:
        rerun = get_rerun_state_machine()
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            rerun.validate_result(
                result=total,
                rejection_func=reject,
                message=f"found {what} in the local forward loss",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([total.detach().view(1), count.view(1)])
    return total, count, {"lm loss": report}


def forward_step(
    batches: Iterator[Any] | None, model: torch.nn.Module, check_finite: bool = True, document_masking: bool = False
) -> tuple[torch.Tensor, Callable[..., LossParts]]:
    """Megatron's forward step: model output, and the function that turns it into a loss on the last stage.

    The loss stays a sum over this rank's tokens: Megatron's schedule and `finalize_model_grads` account for
    context parallelism, and multiplying by its size here too would double the gradients, silently.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    batch = next_batch(batches, device, get_attr_wrapped_model(model, "pg_collection"), document_masking)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
    )
    loss = partial(sum_loss, batch["loss_mask"], check_finite=check_finite, counted_mask=batch["counted_mask"])
    return output, loss
