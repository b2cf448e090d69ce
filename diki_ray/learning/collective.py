"""The few collectives of data-parallel training; in a process without a process group each is the identity.

Gradients of a task are small (164 k numbers), so one flat all-reduce of summed losses and gradients is all that a step
needs, and dividing by the global number of samples afterwards is exact for uneven and empty parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value: int) -> int:
    """The sum of a Python integer of any size, on every rank."""
    return sum(gather_objects(value))


def from_rank_zero(read: Callable[[], T]) -> T:
    """What rank 0 reads, on every rank: two ranks that asked the store apart could see two different moments."""
    box: list[Any] = [read() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Waits for all ranks, up to the process group's time limit."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(num_rows: int, of_rank: int | None = None) -> slice:
    """The contiguous rows that a rank works on when `num_rows` are split over all ranks."""
    r, w = rank() if of_rank is None else of_rank, world_size()
    return slice(num_rows * r // w, num_rows * (r + 1) // w)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, num_rows: int) -> Tensor:
        ctx.num_rows = num_rows
        longest = -(-num_rows // world_size())
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        shares = (share(num_rows, r) for r in range(world_size()))
        return torch.cat([p[: s.stop - s.start] for p, s in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole)  # every rank's images pull at every class
        return whole[share(ctx.num_rows)], None


def gather_rows(part: Tensor, num_rows: int) -> Tensor:
    """All ranks' rows [num_rows, ...] from each rank's `share`, with gradient: each rank receives the sum over ranks of
    the gradients of its own rows. Every rank must call it, and every rank must run backward."""
    return _GatherRows.apply(part, num_rows) if world_size() > 1 else part
