"""Forward step and loss for Megatron's schedules. Letters: b batch, s sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model

from megatron_hybrid import fp8
from megatron_hybrid.training.batches import next_batch
from megatron_hybrid.training.log_line import Wait

LossParts = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def sum_loss(
    loss_mask: torch.Tensor,
    losses: torch.Tensor,
    *,
    check_finite: bool,
    counted_mask: torch.Tensor | None = None,
    z_loss: float = 0.0,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> LossParts:
    """Megatron's three-part loss: sum over this rank's tokens, their number, and what to report.

    Megatron divides: by the tokens of all microbatches and data-parallel ranks under --calculate-per-token-loss
    (which the presets set), else by each microbatch's own.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        losses: [b, s] cross-entropy of each token, or [2, b, s]: that, and its logsumexp.
        check_finite: stop the run on NaN or infinity, after Megatron's rerun machine has looked at it.
        counted_mask: [b, s], 1 where a token is in the denominator; default loss_mask. OLMo-core counts the tokens of
            instances that its repetition filter leaves out of the sum.
        z_loss: times the squared logsumexp, summed as the cross entropy is, is added to the loss (OLMo-core's rule)
            but not to "lm loss", which stays the cross entropy; in training it is reported as "z loss".
        observe: called in training with [sum of cross entropies, tokens] of each microbatch.
    """
    mask = loss_mask.view(-1).float()
    losses, logsumexp = losses if losses.dim() == 3 else (losses, None)
    total = lm_loss = torch.sum(losses.reshape(-1).float() * mask)
    count = (mask if counted_mask is None else counted_mask).sum().detach().to(torch.int)
    reports = {"lm loss": lm_loss}
    if z_loss and logsumexp is not None:
        reports["z loss"] = z_loss * torch.sum(logsumexp.reshape(-1).float().square() * mask)
        total = lm_loss + reports["z loss"]
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
    if not torch.is_grad_enabled():  # Megatron's evaluation prints a perplexity for whatever is reported
        reports = {"lm loss": lm_loss}
    elif observe is not None:
        observe(torch.stack([lm_loss.detach().double(), count.double()]))
    return total, count, {name: torch.stack([value.detach(), count.float()]) for name, value in reports.items()}


def forward_step(
    batches: Iterator[Any] | None,
    model: torch.nn.Module,
    check_finite: bool = True,
    document_masking: bool = False,
    wait: Wait | None = None,
    **loss_options: Any,
) -> tuple[torch.Tensor, Callable[..., LossParts]]:
    """Megatron's forward step: model output, and the function that turns it into a loss on the last stage.

    Args:
        wait: counts how long batches take to come.
        loss_options: z_loss and observe of `sum_loss`.

    The loss stays a sum over this rank's tokens: Megatron's schedule and `finalize_model_grads` account for
    context parallelism, and multiplying by its size here too would double the gradients, silently.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if batches is not None and wait is not None:
        batches = wait.timed(batches)
    groups, rows, config = (get_attr_wrapped_model(model, x) for x in ("pg_collection", "vocabulary_rows", "config"))
    batch = next_batch(batches, device, groups, rows, document_masking, fp8.tokens_multiple(vars(config)))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
    )
    loss_options["counted_mask"] = batch["counted_mask"]
    return output, partial(sum_loss, batch["loss_mask"], check_finite=check_finite, **loss_options)
