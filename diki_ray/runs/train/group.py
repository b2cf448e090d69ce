"""Ray Train: one worker group goes through all pending tasks, so that import, model load and process-group start are
paid once and not for every task.

Ray's own checkpoint manifest is not used, so a truncated one cannot keep a run from starting (docs/reliability.md).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import torch

from diki_ray import errors
from diki_ray.clip.sharded import require_deepspeed
from diki_ray.config import Config
from diki_ray.config.places import with_absolute_paths
from diki_ray.errors import UserError
from diki_ray.learning.collective import barrier, world_size
from diki_ray.runs.cluster import beside_this_process, keeps_memory
from diki_ray.runs.plan import PlannedTask, device_of
from diki_ray.runs.train.faults import injected_faults
from diki_ray.runs.train.worker import learn_all
from diki_ray.store.interface import HeldRun

FAILURE = "failure.json"
"""The document in which a worker tells the driver what the user can put right."""


class Loop(NamedTuple):
    """What every worker of a group is told."""

    config: Config
    tasks: tuple[PlannedTask, ...]
    store: HeldRun
    attempt: str
    """A name of the group's own, for what a worker says about it."""


def train(config: Config, pending: Sequence[PlannedTask], store: HeldRun) -> None:
    """Trains the pending tasks and commits each module; returns when all are committed.

    With `schedule.concurrent_tasks` the tasks are shared out to worker groups that run side by side, as many as the
    cluster has room for now. A module does not depend on which group trained it, nor on what ran beside.

    Raises:
        UserError: what a worker said can be put right (bad data, non-finite loss), or that workers kept dying.
    """
    if config.train.strategy == "deepspeed":
        require_deepspeed()
    config = with_absolute_paths(config)  # Ray Train's workers run in folders of their own
    groups = shared_out(pending, _num_groups(config))
    if len(groups) == 1:
        _train_group(config, pending, store)
        return
    # A Ray task as each group's driver: Ray Train wants a main thread of its own for every fit(). By affinity also
    # when a sweep's trial asks, whose placement group would else hold the task and what it starts.
    drive = ray.remote(max_retries=0, **beside_this_process())(_train_group)
    running = [drive.remote(config, group, store) for group in groups]
    errors_met: list[BaseException] = []
    for reply in running:  # the others go on to the end of their tasks: what they commit is not lost
        try:
            ray.get(reply)
        except ray.exceptions.RayTaskError as error:
            errors_met.append(error.cause if isinstance(error.cause, UserError) else error)
    if errors_met:
        raise errors_met[0]


def shared_out(tasks: Sequence[PlannedTask], num_groups: int) -> list[list[PlannedTask]]:
    """The tasks in up to `num_groups` groups of about equal work: the largest first, each to the least loaded group.

    Tasks that start from a predecessor stay in one group, in order.
    """
    if num_groups <= 1 or any(task.predecessor for task in tasks):
        return [list(tasks)]
    groups: list[list[PlannedTask]] = [[] for _ in range(min(num_groups, len(tasks)))]
    loads = [0] * len(groups)
    for task in sorted(tasks, key=lambda t: -t.num_images_trained):
        least = loads.index(min(loads))
        groups[least].append(task)
        loads[least] += task.num_images_trained
    return groups


def _num_groups(config: Config) -> int:
    if config.schedule.concurrent_tasks == 1:
        return 1
    free, train = ray.available_resources(), config.train
    room = free.get("CPU", 0) / (train.most_workers * train.cpus_per_worker)
    if device_of(config) == "cuda":
        room = min(room, free.get("GPU", 0) / train.most_workers)
    return max(1, min(config.schedule.concurrent_tasks, int(room)))


def _train_group(config: Config, pending: Sequence[PlannedTask], store: HeldRun) -> None:
    import ray.train

    from diki_ray.runs.train.network import TorchOnRaysNetwork
    from diki_ray.runs.train.trainer import Trainer

    use_gpu = device_of(config) == "cuda"
    attempt = uuid.uuid4().hex[:8]
    # A reference, which a controller in a process of its own hands on without importing what it refers to.
    loop = ray.put(Loop(config, tuple(pending), store, attempt))
    trainer = Trainer(
        train_tasks,
        train_loop_config={"loop": loop},
        torch_config=TorchOnRaysNetwork(
            backend="nccl" if use_gpu else "gloo", timeout_s=config.train.collective_timeout_s
        ),
        scaling_config=ray.train.ScalingConfig(
            **_num_workers(config),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            # A name of its own every time: a used one would make Ray restore its manifest of the earlier attempt.
            name=f"{config.run.name}-{attempt}",
            storage_path=f"{store.storage}/ray",
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            # What Ray Train logs is in its session's folder, and not among what the command says.
            logging_config=ray.train.LoggingConfig(  # type: ignore[call-arg]  # Ray Train 2 has it, its stub has not
                log_level="CRITICAL"
            ),
            worker_runtime_env=keeps_memory(),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_what_a_worker_said(store, attempt)
        raise UserError(
            f"training stopped after {config.train.max_failures} restarts of the workers: {_last_line(error)}. What is "
            "committed is safe; run the same command to continue, or raise train.max_failures."
        ) from error
    _raise_what_a_worker_said(store, attempt)


def _num_workers(config: Config) -> dict[str, Any]:
    """How many workers the group has, as Ray Train takes it: fixed, or (at least, at most)."""
    train = config.train
    if train.min_workers is None:
        return {"num_workers": train.most_workers}
    return {
        "num_workers": (min(train.min_workers, train.most_workers), train.most_workers),
        "elastic_resize_monitor_interval_s": train.resize_every_s,
    }


def train_tasks(loop: dict[str, Any]) -> None:
    """Runs in every Ray Train worker. A UserError goes to the store, which the driver reads: trying again would only
    meet it again."""
    config, tasks, store, attempt = ray.get(loop["loop"])
    if _failure(store, attempt) is not None:
        return  # this group was restarted only because a worker had to leave its peers in the middle of a collective
    try:
        learn_all(tasks, config, store, _device(config), injected_faults(store), _draining)
    except UserError as error:
        store.put_document(FAILURE, {"attempt": attempt, "kind": type(error).__name__, "message": str(error)})
        if world_size() > 1:
            raise


def _failure(store: HeldRun, attempt: str) -> dict[str, str] | None:
    said = store.get_document(FAILURE)
    return said if isinstance(said, dict) and said.get("attempt") == attempt else None


def _raise_what_a_worker_said(store: HeldRun, attempt: str) -> None:
    if (said := _failure(store, attempt)) is not None:
        raise getattr(errors, said["kind"], UserError)(said["message"])


def _draining() -> bool:
    """Whether Ray has been told that a node of this group is to be taken away (a spot instance, a drained node).

    Ray then restarts the group elsewhere at the deadline, at no cost to train.max_failures.
    """
    import ray.train

    barrier()  # Ray's own barrier waits without a limit: a rank that hangs is to be met in ours
    return ray.train.get_preemption_info() is not None


def _last_line(error: BaseException) -> str:
    """Ray's errors carry the workers' whole tracebacks; their last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _device(config: Config) -> str | torch.device:
    if device_of(config) != "cuda":
        return "cpu"
    import ray.train.torch

    return ray.train.torch.get_device()
