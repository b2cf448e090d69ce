"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from diki_ray.data.stream import Batch


def on_device(batches: Iterable[Batch], device: str | torch.device) -> Iterator[Batch]:
    """The batches with their images on the device; on the CPU they are passed on as they are.

    On CUDA each is copied from pinned memory on a stream of its own, one ahead of the one in use, so that copying
    overlaps computing.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            images = batch.images.pin_memory().to(device, non_blocking=True)
            copied = copying.record_event()
        if ahead is not None:
            yield _awaited(*ahead)
        ahead = replace(batch, images=images), copied
    if ahead is not None:
        yield _awaited(*ahead)


def _awaited(batch: Batch, copied: torch.cuda.Event) -> Batch:
    computing = torch.cuda.current_stream(batch.images.device)
    computing.wait_event(copied)
    batch.images.record_stream(computing)  # its memory is not given away before what computes is done with it
    return batch
