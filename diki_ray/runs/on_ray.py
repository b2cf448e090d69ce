"""The workplace of a run on Ray: its store is an actor, its workers are Ray Train's, on the cluster of the
configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diki_ray.config import Config
from diki_ray.runs.evaluate.ray_workers import evaluate_run
from diki_ray.runs.run_cluster import cluster
from diki_ray.runs.steps import Workplace
from diki_ray.runs.store_client import StoreClient
from diki_ray.runs.train.group import train


@contextmanager
def held(config: Config) -> Iterator[StoreClient]:
    """Joins or starts the cluster, and holds the run of a configuration, for a block."""
    with cluster(config):
        store = StoreClient.start(config.run.storage, config.run.name, take_over=config.run.take_over)
        try:
            yield store
        finally:
            store.stop()


def _workers(config: Config) -> str:
    least, most, asked = config.train.min_workers, config.train.most_workers, config.train.num_workers
    workers = f"with {'' if least is None else f'{least} to '}{most} worker{'s' if most > 1 else ''}"
    if asked > most:
        parts = f"{most} part{'s' if most > 1 else ''}"
        workers += f" of {asked} (the steps of this run have {parts}, train.num_parts)"
    return workers


ON_RAY = Workplace(held, train, evaluate_run, _workers)
