"""Activation checkpointing: of each block only the input is kept for the backward pass, which computes it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from diki_ray.clip.residual import Tower


def recompute_activations(tower: Tower) -> None:
    """From now on the tower's blocks are computed twice in training, with the same gradients, and not at all otherwise.

    Blocks are wrapped here, and not by open_clip's, timm's or transformers' own switches: those skip blocks with query
    norms, or want training mode, and so dropout.
    """
    for block in tower.blocks:
        block.forward = _recomputed(tower, block.forward)


def _recomputed(tower: Tower, forward: Callable) -> Callable:
    def recomputed(*args: Any, **options: Any) -> Any:
        active, read_at = tower.active, tower.read_at
        if active is None or not torch.is_grad_enabled():
            return forward(*args, **options)

        def again(*args: Any, **options: Any) -> Any:
            # Another pass may have come between this one and its backward pass.
            tower.active, tower.read_at = active, read_at
            return forward(*args, **options)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return recomputed
