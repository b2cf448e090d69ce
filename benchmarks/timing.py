"""Seconds and operations.

Operations are those of matrix products: multiply-adds × 2 of a forward pass, plus the same again for the gradients of
the activations. Frozen weights have no gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.world import World
from diki_ray.clip.packing import packed
from diki_ray.clip.residual import Tower


def timed(device: str, act: Callable[[], Any]) -> float:
    """Seconds, with the device's queue empty before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(device: str, rounds: int, **acts: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each act over rounds, one after the other in every round: a noisy machine meets all alike."""
    for act in acts.values():
        act()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            seconds[name].append(timed(device, act))
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_throughput(device: str, rounds: int) -> float:
    """FLOP/s of a large product in the dtype used, as this device does it now."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / interleaved(device, rounds, product=lambda: a @ b)["product"]


def training_flop(world: World, tokens: Tensor, batch: int) -> float:
    """Of a step with class tokens [C, L], both towers, counted as above; convolution, prompts and loss are left out (a
    few per cent)."""

    def of(tower: Tower, length: int, rows: int, read: int) -> float:
        width = tower.width
        per_token = 12 * width**2 + 2 * length * width  # projections and MLP, the two attention products
        last = length * per_token
        if tower.can_read_alone:  # keys and values of all tokens, the rest of those that are read
            last = length * 2 * width**2 + read * (per_token - 2 * width**2)
        return 2.0 * rows * ((tower.num_blocks - 1) * length * per_token + last)

    backbone = world.backbone
    length = backbone.model.visual.positional_embedding.shape[0]
    rows = packed(tokens[:, : backbone._needed_length(tokens)], backbone._ends(tokens), backbone.texts_a_row)
    num_rows, num_tokens = rows.tokens.shape
    return 2 * (of(backbone.image, length, batch, 1) + of(backbone.text, num_tokens, num_rows, rows.ends.shape[1]))
