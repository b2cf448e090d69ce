"""Functions that run as the ranks of a group, in processes that find torch and this package imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], *arguments: Any, num_ranks: int) -> None:
    """`function(rank, *arguments)` for every rank, each in a process of its own; what one raises is raised here.

    They are forked from a server that has done nothing but import: that costs once what takes each fresh process five
    seconds, and nothing of this process (threads, autograd, a Ray connection) is in them.
    """
    multiprocessing.set_forkserver_preload(["diki_ray.runs.train.worker"])
    mp.start_processes(function, arguments, nprocs=num_ranks, start_method="forkserver")
