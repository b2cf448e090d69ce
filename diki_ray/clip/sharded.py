"""ZeRO-3 for the frozen weights (Rajbhandari et al. 2020): each worker keeps its share of every matrix, and a block is
whole only while it computes. DeepSpeed does it; what a task trains is small and stays whole on every worker.

Gathering a block is a collective, so all workers have to make the same passes: those of a rank without images or
classes are made with a blank one (`Backbone.in_lockstep`).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch.distributed as dist
from torch import nn

from diki_ray.clip.backbone import Backbone
from diki_ray.errors import ConfigError


def require_deepspeed() -> None:
    """Raises ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.strategy=deepspeed: DeepSpeed is not installed here; `DS_BUILD_OPS=0 pip install "
            "'diki-ray[deepspeed]'` on every node, or set train.strategy=ddp."
        )


def shard(backbone: Backbone, offload: bool = False) -> None:
    """Shares the backbone's weights out to the workers, in place; every worker must call it, in a process group.

    offload: the shares lie in the CPU's memory, for GPUs that are too small even for them.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot run here.
    """
    require_deepspeed()
    # Whole blocks are gathered at once: MultiheadAttention reads its projection's weights from outside the projection.
    blocks = {type(block) for tower in backbone.towers for block in tower.blocks}
    # Not the text tower's owner itself: its few own parameters (projection, positions) are read outside its forward.
    image, owner = backbone.model.visual, getattr(backbone.model, "text", backbone.model)
    parts = nn.ModuleList([image, *(part for part in owner.children() if part is not image)])
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": backbone.device.type == "cuda"}
    try:
        import deepspeed

        deepspeed.logger.setLevel(logging.ERROR)
        # None of its compiled operators: looking for them runs the compiler, and one would be built on the CPU, which
        # takes minutes and speeds up nothing here.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        deepspeed.utils.set_z3_leaf_modules(parts, list(blocks))
        engine, *_ = deepspeed.initialize(
            model=parts, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        )
    except (ImportError, RuntimeError, OSError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"train.strategy=deepspeed: DeepSpeed cannot run here ({type(error).__name__}: "
            f"{(str(error).splitlines() or ['no message'])[0]}); set train.strategy=ddp."
        ) from error
    parts.eval()

    def start_pass() -> None:  # holds the engine, which takes its hooks away when it goes
        engine.optimizer.release_backward_leftovers()  # the first block has no input with a gradient to tell it to

    backbone.start_pass = start_pass


def resident_bytes(backbone: Backbone) -> int:
    """Bytes of the backbone's weights that this worker holds now: its shares, and what is whole."""
    return sum(
        p.numel() * p.element_size() if p.numel() else share.numel() * share.element_size()
        for p in backbone.model.parameters()
        for share in [getattr(p, "ds_tensor", p)]
    )
