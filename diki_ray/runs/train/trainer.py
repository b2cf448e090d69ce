"""Ray Train's trainer for PyTorch, which starts workers and nothing else on a cluster that this process started.

Ray Train (2.60) starts a process for its controller, which imports Ray Train and PyTorch once more before the workers
may start, and one that asks an autoscaler for nodes: together a third of the time to the first step on two cores.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray._private.ray_constants import env_bool
from ray._private.worker import get_dashboard_url
from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from diki_ray.runs.cluster import started_here, unwatched


class Trainer(TorchTrainer):
    """Ray's, with neither the processes nor the signal handler that a run of this package has no use for."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if not _runs_here():
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]  # of the class behind the name
        if isinstance(parts["scaling_policy"], FixedScalingPolicy):
            parts["scaling_policy"] = _Unannounced(parts["scaling_policy"].scaling_config)
        with unwatched():
            controller = _Controller(**parts)
        try:
            asyncio.run(controller.run())
        finally:  # who interrupts fit() in a process that lives on gets the workers' resources back
            if (group := controller.get_worker_group()) is not None and group.has_started():
                group.abort()
        return controller.get_result()

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's handler would wait for the workers for 30 s, and stay when fit() is over: runs/stopping.py."""

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's data sets have a process of their own, and none is used. The cleaner is for controllers that die and
        # leave a driver behind. It asks the dashboard whether the controller lives, and where there is none, each
        # training would end with 12 s of waiting for its answer.
        cleaned = get_dashboard_url() and not _runs_here()
        unused = DatasetsCallback if cleaned else (DatasetsCallback, PlacementGroupCleanerCallback)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, unused)]


def _runs_here() -> bool:
    """Whether the controller runs in this process: it does on a cluster that this process started.

    It needs a process where an event loop runs already, as in a notebook, and where Ray's dashboard shows trainings.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return started_here() and not env_bool(RAY_TRAIN_ENABLE_STATE_TRACKING, False)
    return False


class _WorkerGroup(WorkerGroup):
    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, arguments: dict[str, list[Any]]
    ) -> None:
        """As Ray's, but for `controller_actor`: a worker would ask it for checkpoints of Ray's, and there are none."""
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in arguments.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class _Unannounced(FixedScalingPolicy):
    """Ray's for a fixed number of workers, of which the process that asks an autoscaler for nodes is not told."""

    def _send_resource_request(self) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...
