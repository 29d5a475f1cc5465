"""Cross entropy and logsumexp of every token, with the vocabulary split over tensor-parallel ranks.

Megatron's own cross entropy keeps no logsumexp, which the z-loss needs, and takes whole logits, which at 65,536 tokens
are 39 GB in fp32. Here backward computes softmax again from what forward was given: from logits, or, chunk by chunk,
from the hidden states and the output layer's weight, so that no more than a chunk of logits ever exists.

Letters: n tokens, D hidden, R vocabulary rows of this rank. All arithmetic on logits is in fp32: on a GPU in registers
(kernels/triton_cross_entropy.py), elsewhere a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

#: On CPU, logits of so many tokens are held in fp32 at a time: 0.4 GB for 100,352 rows.
FP32_TOKENS = 1024


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and logsumexp of each token, both differentiable.

    Args:
        logits: [..., R], this rank's columns, in any floating dtype.
        labels: [...], over the whole vocabulary.

    Returns:
        Two fp32 tensors in the labels' shape, the same on every rank of `group`.
    """
    losses, logsumexp = _OfLogits.apply(logits.flatten(0, -2), labels.flatten(), group)
    return losses.view(labels.shape), logsumexp.view(labels.shape)


def chunked_token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    group: dist.ProcessGroup,
    chunk_tokens: int,
    real_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_losses` of `hidden @ weight.T`, of which at most `chunk_tokens` rows exist at a time.

    Forward and backward each compute the logits once: one product more than with whole logits, 2·D·R per token.

    Args:
        hidden: [..., D], all tokens on every rank of `group`; its gradient is this rank's share, to be summed by the
            caller's mapping.
        weight: [R, D]. Its gradient is summed over chunks in fp32.
        real_rows: rows of this rank that are no padding, the first ones.
    """
    out = _OfHidden.apply(hidden.flatten(0, -2), weight, labels.flatten(), group, chunk_tokens, real_rows)
    return out[0].view(labels.shape), out[1].view(labels.shape)


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local = _local_labels(labels, logits.shape[-1], group)
        losses, logsumexp = _combine([_partial(logits, local)], group)
        ctx.save_for_backward(logits, local, logsumexp)
        return losses, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        logits, local, logsumexp = ctx.saved_tensors
        return _logits_gradient(logits, local, logsumexp, *grads, out=torch.empty_like(logits)), None, None


class _OfHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        group: dist.ProcessGroup,
        chunk_tokens: int,
        real_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.chunk_tokens, ctx.real_rows = chunk_tokens, real_rows
        local = _local_labels(labels, weight.shape[0], group)
        chunks = zip(hidden.split(chunk_tokens), local.split(chunk_tokens), strict=True)
        parts = [_partial(_logits(part, weight, real_rows), rows) for part, rows in chunks]
        losses, logsumexp = _combine(parts, group)
        ctx.save_for_backward(hidden, weight, local, logsumexp)
        return losses, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden, weight, local, logsumexp = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        rows = (hidden, local, logsumexp, *grads)
        for out, part, *others in zip(*(x.split(ctx.chunk_tokens) for x in (grad_hidden, *rows)), strict=True):
            logits = _logits(part, weight, ctx.real_rows)
            grad = _logits_gradient(logits, *others, out=logits)
            torch.mm(grad, weight, out=out)
            grad_weight += grad.t() @ part
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, real_rows: int) -> torch.Tensor:
    """[n, R]; columns of padding are the lowest number, which softmax turns into 0."""
    logits = hidden @ weight.t()
    if real_rows < weight.shape[0]:
        logits[:, real_rows:] = torch.finfo(logits.dtype).min
    return logits


def _local_labels(labels: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[n]: each label's column on this rank, −1 where it is another rank's."""
    local = labels - group.rank() * rows
    return torch.where((local >= 0) & (local < rows), local, -1)


def _partial(logits: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's logsumexp [n], and the label's logit [n] where the label is here, else 0; both fp32."""
    if logits.is_cuda:
        from megatron_hybrid.kernels.triton_cross_entropy import logsumexp_and_picked

        return logsumexp_and_picked(logits, local)
    logsumexp, picked = torch.empty(2, len(local), dtype=torch.float32)
    for total, label, part, column in _some_tokens(logsumexp, picked, logits, local):
        fp32 = part.float()
        total.copy_(fp32.logsumexp(-1))
        label.copy_(fp32.gather(1, column.clamp(min=0)[:, None])[:, 0].where(column >= 0, 0.0))
    return logsumexp, picked


def _some_tokens(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Views of FP32_TOKENS tokens of each."""
    return zip(*(tensor.split(FP32_TOKENS) for tensor in tensors), strict=True)


def _combine(
    parts: list[tuple[torch.Tensor, torch.Tensor]], group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's partial results to (losses, logsumexp), two messages of a number or two a token."""
    logsumexp, picked = (torch.cat(column) for column in zip(*parts, strict=True))
    if group.size() > 1:
        largest = logsumexp.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(logsumexp - largest).exp(), picked])
        dist.all_reduce(sums, group=group)
        logsumexp, picked = largest + sums[0].log(), sums[1]
    return logsumexp - picked, logsumexp


def _logits_gradient(
    logits: torch.Tensor,
    local: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_losses: torch.Tensor,
    grad_logsumexp: torch.Tensor,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """`out` [n, R]: softmax · (both gradients), minus the loss's gradient at the label. It may be `logits`."""
    rows = (logits, local, logsumexp, grad_losses, grad_logsumexp, out)
    if logits.is_cuda:
        from megatron_hybrid.kernels.triton_cross_entropy import logits_gradient

        logits_gradient(*rows)
        return out
    for part, column, total, loss, lse, result in _some_tokens(*rows):
        grad = (part.float() - total[:, None]).exp_()
        grad *= (loss + lse)[:, None]
        at_label = torch.where(column >= 0, -loss, 0.0)[:, None]
        result.copy_(grad.scatter_add_(1, column.clamp(min=0)[:, None], at_label))
    return out
