"""The workplace of a run without Ray: one worker, which is this process (a notebook, a script)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from diki_ray.answering.evaluation import Evaluation
from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.runs.evaluate.split import Progress, digests_of, evaluate_here
from diki_ray.runs.plan import Plan, PlannedTask, device_of
from diki_ray.runs.steps import Workplace
from diki_ray.runs.train.worker import learn_all
from diki_ray.store.caches import Cache
from diki_ray.store.held_here import HeldHere, held_here
from diki_ray.store.interface import HeldRun


def held(config: Config) -> AbstractContextManager[HeldHere]:
    """Holds the run of a configuration for a block."""
    return held_here(config.run.storage, config.run.name, "diki_ray in Python", config.run.take_over)


def train(config: Config, pending: Sequence[PlannedTask], store: HeldRun) -> None:
    """Trains tasks and commits each module.

    Raises:
        ConfigError: the backbone is to be shared out to workers. Else as `learn_all`.
    """
    if config.train.strategy == "deepspeed":
        raise ConfigError("train.strategy=deepspeed shares the backbone out to workers: give the address of a cluster.")
    with _threads_kept():
        learn_all(pending, config, store, device_of(config))


def evaluate(plan: Plan, store: HeldRun, on_progress: Progress) -> Evaluation:
    """Evaluates the test sets of a plan whose modules are committed, along its stream.

    Raises:
        DataError: as `evaluate_here`.
    """
    stream, cache = range(len(plan.tasks)), Cache.open(store.storage)
    with _threads_kept():
        return evaluate_here(plan, digests_of(plan, store), store.read_module, [stream], "test", cache, on_progress)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Workers set the process's number of threads, on which modules depend; the caller gets its own back."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


IN_PROCESS = Workplace(held, train, evaluate, lambda config: "in this process")
