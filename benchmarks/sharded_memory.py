"""What a worker holds of a frozen backbone, plain and shared out: `python benchmarks/sharded_memory.py [NAME]`.

NAME is a model of open_clip with random weights, ViT-B-16 by default. Each of two processes on the CPU encodes one
image before and after. Bytes of weights, and the resident set at rest and at its peak over one pass (Linux).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diki_ray.clip import sharded
from diki_ray.clip.backbone import Backbone

WORLD_SIZE = 2
STRATEGIES = ("ddp", "deepspeed", "deepspeed, offload")


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def measure(rank: int, name: str, group: str, strategy: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    model = open_clip.create_model(name, pretrained=None, device="cpu").eval()
    backbone = Backbone(model, lambda image: image, open_clip.get_tokenizer(name), name).to("cpu")
    dist.init_process_group("gloo", f"file://{group}", world_size=WORLD_SIZE, rank=rank)
    if strategy != "ddp":
        sharded.shard(backbone, offload=strategy.endswith("offload"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: loading needs the whole model
    side = backbone.model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    before = resident_mb("VmRSS")
    with torch.no_grad():
        backbone.encode_image(torch.rand(1, 3, height, width))
    print(
        f"{strategy:18}  rank {rank}  weights {sharded.resident_bytes(backbone) / 1e6:7.1f} MB  "
        f"resident {before:7.1f} MB, at its peak {resident_mb('VmHWM'):7.1f} MB",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "ViT-B-16"
    for strategy in STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(measure, (name, f"{folder}/group", strategy), nprocs=WORLD_SIZE, start_method="spawn")
