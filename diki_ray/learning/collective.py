"""The few collectives of data-parallel training; in a process without a process group each is the identity.

A step is computed in a fixed number of parts, each of its own samples and classes, that the ranks share. What the parts
give is gathered and added in the order of the parts, on every rank alike, so that any number of ranks gets the same
bits. Gradients of a task are small (164 k numbers): one flat tensor a part, with its losses and counts behind, and
dividing the sum by the global number of samples is exact for uneven and empty parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
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


def share(num_rows: int, part: int, num_parts: int) -> slice:
    """The contiguous rows that a part has of `num_rows`; maybe none where there are more parts than rows."""
    return slice(num_rows * part // num_parts, num_rows * (part + 1) // num_parts)


def own_parts(num_parts: int) -> range:
    """The parts that this rank computes: neighbours, as many as the others' or one more; one each, if all ranks have
    one. There are never more ranks than parts.

    Raises:
        ValueError: there are.
    """
    if world_size() > num_parts:
        raise ValueError(f"{world_size()} workers cannot share {num_parts} parts")
    return _parts_of(rank(), num_parts)


def _parts_of(of_rank: int, num_parts: int) -> range:
    return range(-(-of_rank * num_parts // world_size()), -(-(of_rank + 1) * num_parts // world_size()))


def gather_parts(own: Sequence[Tensor], num_parts: int) -> list[Tensor]:
    """The tensors of all parts, in order, on every rank; own: those of this rank's parts. All have one shape."""
    if world_size() == 1:
        return list(own)
    most = -(-num_parts // world_size())
    padded = torch.stack([*own, *[torch.zeros_like(own[0])] * (most - len(own))])
    found = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(found, padded)
    return [part for r, parts in enumerate(found) for part in parts[: len(_parts_of(r, num_parts))]]


def sum_of_parts(own: Sequence[Tensor], num_parts: int) -> Tensor:
    """The sum over all parts, added in their order whichever rank computed which: the same bits for any number of
    ranks."""
    return reduce(torch.add, gather_parts(own, num_parts))


def gather_rows(own: Sequence[Tensor], num_rows: int, num_parts: int) -> Tensor:
    """All rows [num_rows, ...] in order, on every rank, from those of this rank's parts: of each its `share`."""
    if world_size() == 1:
        return own[0] if num_parts == 1 else torch.cat(list(own))
    longest = -(-num_rows // num_parts)
    padded = [torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])]) for part in own]
    shares = (share(num_rows, part, num_parts) for part in range(num_parts))
    found = gather_parts(padded, num_parts)
    return torch.cat([p[: s.stop - s.start] for p, s in zip(found, shares, strict=True)])
