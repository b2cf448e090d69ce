"""Several evaluation workers on Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray

from diki_ray.answering.evaluation import Evaluation
from diki_ray.config import Config
from diki_ray.config.places import with_absolute_paths
from diki_ray.errors import UserError
from diki_ray.runs.cluster import keeps_memory
from diki_ray.runs.evaluate.split import SplitEvaluation, digests_of, prefixes
from diki_ray.runs.evaluate.worker import EvaluationWorker, Work
from diki_ray.runs.plan import Plan, device_of
from diki_ray.runs.progress import OnProgress
from diki_ray.store.caches import Cache
from diki_ray.store.interface import HeldRun

EvaluationActor: Any = ray.remote(max_restarts=3, max_task_retries=3)(EvaluationWorker)


class RayWorkers:
    """Workers on Ray, started when there is something to do; one that is free takes the next piece."""

    def __init__(self, config: Config, *arguments: Any):
        """arguments: those of `EvaluationWorker` after the configuration."""
        gpus = 1 if device_of(config) == "cuda" else 0
        actor = EvaluationActor.options(
            num_cpus=config.evaluate.cpus_per_worker, num_gpus=gpus, runtime_env=keeps_memory()
        )
        self._start = partial(actor.remote, config, *arguments)
        self._most, self._workers = config.evaluate.num_workers, list[Any]()

    def __call__(self, work: Sequence[Work]) -> Iterator[tuple[int, Any]]:
        while len(self._workers) < min(self._most, len(work)):
            self._workers.append(self._start())
        waiting, free = list(enumerate(work))[::-1], list(self._workers)
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and free:
                number, piece = waiting.pop()
                worker = free.pop()
                running[worker.do.remote(piece)] = (number, worker)
            ready, _ = ray.wait(list(running), num_returns=1)
            number, worker = running.pop(ready[0])
            free.append(worker)
            try:
                found = ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                # Ray's own text is the worker's traceback; what the user can put right is said in the cause.
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            yield number, found

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)


def evaluate_run(plan: Plan, store: HeldRun, on_progress: OnProgress) -> Evaluation:
    """The test sets of a plan whose modules are committed, along its stream, by workers on Ray.

    Raises:
        DataError: a test set is missing, or more of it than allowed could not be read.
    """
    digests, asked = digests_of(plan, store), prefixes([range(len(plan.tasks))])
    workers = RayWorkers(with_absolute_paths(plan.config), plan.tasks, digests, store.read_module, "test", asked)
    try:
        return SplitEvaluation(plan, digests, store.read_module, "test", asked, Cache.open(store.storage)).by(
            workers, on_progress
        )
    finally:
        workers.stop()
