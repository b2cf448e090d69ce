"""Ray Train: one worker group goes through all pending tasks, so that import, model load and process-group start are
paid once and not for every task.

The workers know the store by its actor's name and never touch storage themselves. What is committed, and the newest
good checkpoint of a task under way, are the store's to say: Ray's own checkpoint manifest is not used, so a truncated
one cannot keep a run from starting (docs/reliability.md).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

import diki_ray
from diki_ray import errors
from diki_ray.clip.recomputation import recompute_activations
from diki_ray.clip.residual import Parameters
from diki_ray.clip.sharded import require_deepspeed, shard
from diki_ray.config import Config
from diki_ray.data.shards import SkipLedger
from diki_ray.data.stream import TrainStream, eval_batches
from diki_ray.data.to_device import on_device
from diki_ray.errors import UserError
from diki_ray.learning.collective import all_reduce_sum, rank, world_size
from diki_ray.learning.methods import Method, TrainingBatch
from diki_ray.learning.module import NUM_VALIDATION_FEATURES, TaskModule, read_tensors, write_tensors
from diki_ray.learning.moments import Moments
from diki_ray.learning.task_trainer import TaskTrainer
from diki_ray.runs.plan import (
    PlannedTask,
    build_method,
    device_of,
    load_backbone,
    precision_of,
    recipe_of,
    with_absolute_paths,
)
from diki_ray.runs.store_client import StoreClient
from diki_ray.runs.train.cost import Cost, CostMeter, merged
from diki_ray.runs.train.faults import Faults

REPORT_EVERY_S = 0.5
DRAIN_CHECK_EVERY_STEPS = 4
"""Asking whether a node is to be taken away waits for every rank; the notice comes half a minute ahead or more."""
NOT_IN_A_MODULE = {
    *("cpus_per_worker", "checkpoint_every_steps", "max_failures", "collective_timeout_s"),
    *("compile", "min_workers", "resize_every_s", "offload", "min_steps"),
}
"""Settings that change nothing of what is learnt. After a failure one may want others, and still the same module."""
FAILURE = "failure.json"
"""The document in which a worker tells the driver what the user can put right."""


def train(config: Config, pending: Sequence[PlannedTask], store: StoreClient) -> None:
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
    # A Ray task as each group's driver: Ray Train wants a main thread of its own for every fit(). Placed like any other
    # task also when a sweep's trial asks, whose placement group would else hold it and what it starts.
    drive = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")(_train_group)
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
    room = free.get("CPU", 0) / (train.num_workers * train.cpus_per_worker)
    if device_of(config) == "cuda":
        room = min(room, free.get("GPU", 0) / train.num_workers)
    return max(1, min(config.schedule.concurrent_tasks, int(room)))


def _train_group(config: Config, pending: Sequence[PlannedTask], store: StoreClient) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = device_of(config) == "cuda"
    attempt = uuid.uuid4().hex[:8]
    trainer = TorchTrainer(
        train_tasks,
        train_loop_config={"config": config, "tasks": tuple(pending), "store": store, "attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=config.train.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(
            **_num_workers(config),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            # A name of its own every time: a used one would make Ray restore its manifest of the earlier attempt.
            name=f"{config.run.name}-{attempt}",
            storage_path=f"{store.handle.storage}/ray",
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
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
        return {"num_workers": train.num_workers}
    return {
        "num_workers": (train.min_workers, train.num_workers),
        "elastic_resize_monitor_interval_s": train.resize_every_s,
    }


def train_tasks(loop: dict[str, Any]) -> None:
    """Runs in every Ray Train worker. A UserError goes to the store, which the driver reads: trying again would only
    meet it again."""
    config, tasks, store, attempt = loop["config"], loop["tasks"], loop["store"], loop["attempt"]
    if _failure(store, attempt) is not None:
        return  # this group was restarted only because a worker had to leave its peers in the middle of a collective
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    try:
        backbone = _backbone_for_training(config)
        if config.train.activation_checkpointing:
            for tower in backbone.towers:
                recompute_activations(tower)
        worker = TaskWorker(config, build_method(config, backbone), store, draining=_draining)
        for task in tasks:
            worker.learn(task)
    except UserError as error:
        store.put_document(FAILURE, {"attempt": attempt, "kind": type(error).__name__, "message": str(error)})
        if world_size() > 1:
            raise


def _failure(store: StoreClient, attempt: str) -> dict[str, str] | None:
    said = store.get_document(FAILURE)
    return said if said and said["attempt"] == attempt else None


def _raise_what_a_worker_said(store: StoreClient, attempt: str) -> None:
    if (said := _failure(store, attempt)) is not None:
        raise getattr(errors, said["kind"], UserError)(said["message"])


def _draining() -> bool:
    """Whether Ray has been told that a node of this group is to be taken away (a spot instance, a drained node).

    Ray then restarts the group elsewhere at the deadline, at no cost to train.max_failures.
    """
    import ray.train

    _barrier()  # Ray's own barrier waits without a limit: a rank that hangs is to be met in ours
    return ray.train.get_preemption_info() is not None


def _last_line(error: BaseException) -> str:
    """Ray's errors carry the workers' whole tracebacks; their last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _backbone_for_training(config: Config) -> Any:
    device: Any = device_of(config)
    if device == "cuda":
        import ray.train.torch

        device = ray.train.torch.get_device()
    backbone = load_backbone(config).to(device, precision_of(config))
    if config.train.strategy == "deepspeed":
        shard(backbone, config.train.offload)
    return backbone.compile() if config.train.compile else backbone


@dataclass
class TaskWorker:
    """One worker's way through its tasks; plain but for the store it is given, so it also runs without Ray Train."""

    config: Config
    method: Method
    store: StoreClient
    on_epoch: Callable[[int, float | None], None] = lambda epoch, validation_accuracy: None
    """Called on every rank after each epoch."""
    draining: Callable[[], bool] = lambda: False
    """Whether a node of this group is about to be taken away; called by every rank, with one answer for all."""

    def learn(self, task: PlannedTask) -> None:
        """Trains, takes the statistics of, and commits one task; nothing when its module is already there."""
        if _from_rank_zero(lambda: task.key in {entry.key for entry in self.store.modules()}):
            return
        meter = CostMeter(self.method.backbone.device)
        trainer, ledger = self._start(task)
        skipped = 0
        if trainer.parameters:
            ledger, skipped = self._train(task, trainer, ledger)
        moments, parameters = self._statistics(task, trainer)
        validation = self._validation_features(task)
        consumed, cost = _sum(ledger), merged(_gathered(meter.read()))
        if rank() == 0:
            self._commit(task, trainer, parameters, moments, validation, consumed, skipped, cost)
        _barrier()  # nobody starts the next task before this one is durable: a crash then leaves at most one open

    def _train(self, task: PlannedTask, trainer: TaskTrainer, ledger: int) -> tuple[int, int]:
        """All epochs that are left; returns this rank's part of the ledger and how many samples all ranks skipped."""
        stream = TrainStream(
            task.index,
            "train",
            seed=task.seed,
            batch_size=self.config.train.batch_size,
            num_streams=self.config.train.num_streams,
            world_size=world_size(),
            rank=rank(),
            transform=self.method.backbone.preprocess,
            num_threads=self.config.data.num_threads,
            ledger=self._ledger(task, "train"),
        )
        first_epoch, first_batch = divmod(trainer.progress.step, stream.num_batches)
        for epoch in range(first_epoch, task.num_epochs):
            ledger = self._epoch(task, trainer, stream, epoch, first_batch if epoch == first_epoch else 0, ledger)
        return ledger, _sum(stream.ledger.total)

    def _start(self, task: PlannedTask) -> tuple[TaskTrainer, int]:
        """The trainer at its newest good checkpoint or at the beginning, and this rank's part of the ledger."""
        generator = torch.Generator().manual_seed(task.seed)
        predecessor = self._predecessor(task)
        num_batches = -(-task.index.split("train").num_samples // self.config.train.batch_size)
        trainer = TaskTrainer(
            self.method,
            self.method.backbone.tokenize(task.class_names, task.templates[0]),
            recipe_of(self.config),
            num_steps=task.num_epochs * num_batches,
            parameters=self.method.initial(generator, predecessor),
            seed=task.seed,
        )
        saved = _from_rank_zero(lambda: self.store.load_checkpoint(task.key))
        if saved is None:
            return trainer, 0
        header, arrays = read_tensors(saved[1])
        trainer.load_state(header, arrays)
        return trainer, header["consumed"] if rank() == 0 else 0

    def _predecessor(self, task: PlannedTask) -> Parameters | None:
        if task.predecessor is None:
            return None
        # Of the run's, else of the library's: in a sweep another run may have trained the tasks before.
        module = TaskModule.from_bytes(self.store.module_by_key(task.predecessor))
        # By name: safetensors gives tensors in another order in each process, and optimiser states and gradients of
        # all ranks are matched by it.
        return {name: torch.from_numpy(np.array(p)) for name, p in sorted(module.parameters.items())}

    def _epoch(
        self, task: PlannedTask, trainer: TaskTrainer, stream: TrainStream, epoch: int, first_batch: int, ledger: int
    ) -> int:
        """One epoch from a batch on, with its validation; returns this rank's part of the ledger."""
        meter = _Meter(self, task, epoch, trainer)
        faults = Faults(self.store)
        for batch in on_device(stream.epoch(epoch, first_batch), self.method.backbone.device):
            images = faults.before_step(task.name, rank(), trainer.progress.step, batch.images)
            result = trainer.step(images, batch.labels, batch.keys)
            ledger += sum(_ledger_entry(epoch, batch.step, position) for position in batch.positions)
            meter.add(result.num_samples)
            if batch.step + 1 < stream.num_batches and self._checkpoint_is_due(trainer.progress.step):
                ledger = self._checkpoint(task, trainer, ledger)
        validation = self._validate(task, trainer)
        if rank() == 0:
            meter.send("epoch", validation_accuracy=validation)
        trainer.end_epoch(epoch, validation)
        self.on_epoch(epoch, validation)
        if epoch + 1 < task.num_epochs:
            ledger = self._checkpoint(task, trainer, ledger)
        return ledger

    def _checkpoint_is_due(self, step: int) -> bool:
        if step % self.config.train.checkpoint_every_steps == 0:
            return True
        return step % DRAIN_CHECK_EVERY_STEPS == 0 and self.draining()

    def _checkpoint(self, task: PlannedTask, trainer: TaskTrainer, ledger: int) -> int:
        """Saves the state, the same on every rank; rank 0 writes it and takes over everybody's part of the ledger."""
        consumed = _sum(ledger)
        if rank() == 0:
            header, arrays = trainer.state()
            faults, step = Faults(self.store), trainer.progress.step
            faults.at("checkpoint", task.name, 0, step)
            self.store.save_checkpoint(task.key, step, write_tensors(header | {"consumed": consumed}, arrays))
            faults.at("checkpointed", task.name, 0, step)
        return consumed if rank() == 0 else 0

    def _validate(self, task: PlannedTask, trainer: TaskTrainer) -> float | None:
        """Accuracy on the validation split with the task's own module at w = 1; None without such a split."""
        if "val" not in task.index.splits:
            return None
        class_features = trainer.class_features()
        correct = count = 0
        for images, labels in self._share_of(task, "val"):
            correct += trainer.num_correct(images, labels, class_features)
            count += len(labels)
        total = all_reduce_sum(torch.tensor([correct, count], dtype=torch.float64, device=trainer.device))
        return float(total[0] / total[1])

    def _share_of(self, task: PlannedTask, split: str) -> Any:
        """(images, labels) of the canonical batches that fall to this rank."""
        size = self.config.evaluate.batch_size if split == "test" else self.config.train.batch_size
        num_batches = -(-task.index.split(split).num_samples // size)
        mine = range(rank(), num_batches, world_size())
        batches = eval_batches(
            task.index,
            split,
            batch_size=size,
            transform=self.method.backbone.preprocess,
            batches=mine,
            num_threads=self.config.data.num_threads,
            ledger=self._ledger(task, split),
        )
        for batch in on_device(batches, self.method.backbone.device):
            yield batch.images, batch.labels
        if self.method.backbone.in_lockstep and len(mine) * world_size() < num_batches:
            yield torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def _statistics(self, task: PlannedTask, trainer: TaskTrainer) -> tuple[Moments, Parameters]:
        """Moments of the frozen features of the training images, and what the module holds with the method's own sums
        over them; both merged over ranks in rank order."""
        method, tokens = self.method, trainer.class_tokens
        own, sums = Moments.empty(method.backbone.embed_dim), Sums()
        for images, labels in self._share_of(task, "train"):
            features = method.backbone.encode_image(images)
            own = own.merge(Moments.of(features.cpu()))
            sums.add(method.sums(trainer.best, TrainingBatch(images, labels, features, tokens)))
        merged = Sums()
        for parts in _gathered(sums.tensors):
            merged.add(parts)
        return Moments.merged(_gathered(own)), method.finish(trainer.best, merged.tensors)

    @torch.no_grad()
    def _validation_features(self, task: PlannedTask) -> np.ndarray:
        """float16 [M, E] of the first validation images; the same on every rank, for M is small."""
        backbone = self.method.backbone
        if "val" not in task.index.splits:
            return np.zeros((0, backbone.embed_dim), np.float16)
        batches = eval_batches(
            task.index,
            "val",
            batch_size=NUM_VALIDATION_FEATURES,
            transform=backbone.preprocess,
            batches=[0],
            num_threads=self.config.data.num_threads,
            ledger=self._ledger(task, "val"),
        )
        return np.concatenate([backbone.encode_image(b.images).cpu().numpy() for b in batches]).astype(np.float16)

    def _ledger(self, task: PlannedTask, split: str) -> SkipLedger:
        num_samples = task.index.split(split).num_samples
        return SkipLedger(budget=int(self.config.data.max_skipped_fraction * num_samples))

    def _commit(
        self,
        task: PlannedTask,
        trainer: TaskTrainer,
        parameters: Parameters,
        moments: Moments,
        validation: np.ndarray,
        consumed: int,
        skipped: int,
        cost: Cost,
    ) -> None:
        progress = trainer.progress
        module = TaskModule(
            key=task.key,
            task=task.name,
            class_names=task.class_names,
            templates=task.templates,
            method=self.config.method.name,
            parameters={name: p.cpu().numpy() for name, p in parameters.items()},
            moments=moments,
            validation_features=validation,
            provenance={
                "data": {"name": task.index.name, "digest": task.index.digest(), "protocol": task.index.split_protocol},
                "seed": task.seed,
                "method": self.config.method.model_dump(exclude=set(self.method.only_answering)),
                "train": self.config.train.model_dump(exclude=NOT_IN_A_MODULE)
                | {"epochs": task.num_epochs, "num_threads": torch.get_num_threads()},
                "best_epoch": progress.best_epoch if progress.history else None,
                "history": progress.history,
                "num_steps": progress.step,
                "world_sizes": progress.world_sizes,
                "num_nonfinite_steps": trainer.num_nonfinite,
                "num_skipped": skipped,
                "consumed": consumed,
                "versions": {"diki_ray": diki_ray.__version__, "torch": torch.__version__},
            },
        )
        metadata = {
            "task": task.name,
            "num_classes": len(task.class_names),
            "method": self.config.method.name,
            "cost": cost,  # of the attempt that committed it
        }
        faults = Faults(self.store)
        faults.at("commit", task.name, 0, progress.step)
        self.store.commit_module(task.key, task.name, module.to_bytes(), metadata)
        faults.at("committed", task.name, 0, progress.step)
        self.store.drop_checkpoints(task.key)


class Sums:
    """Sums of a method's tensors over batches, float64 on the CPU."""

    def __init__(self) -> None:
        self.tensors: Parameters = {}

    def add(self, tensors: Parameters) -> None:
        for name, tensor in tensors.items():
            term = tensor.detach().to("cpu", torch.float64)
            self.tensors[name] = self.tensors[name] + term if name in self.tensors else term


class _Meter:
    """Tells the driver now and then where an epoch stands; rank 0 only."""

    def __init__(self, worker: TaskWorker, task: PlannedTask, epoch: int, trainer: TaskTrainer):
        self.store, self.trainer = worker.store, trainer
        self.event = {"task": task.name, "epoch": epoch, "num_epochs": task.num_epochs}
        self.started, self.reported, self.count = time.monotonic(), 0.0, 0

    def add(self, num_samples: int) -> None:
        self.count += num_samples
        if rank() == 0 and time.monotonic() - self.reported > REPORT_EVERY_S:
            self.reported = time.monotonic()
            self.send("step")

    def send(self, kind: str, **more: Any) -> None:
        seconds, trainer = time.monotonic() - self.started, self.trainer
        self.store.record_progress(
            {"kind": kind}
            | self.event
            | {
                "step": trainer.progress.step,
                "num_steps": trainer.num_steps,
                "loss": trainer.progress.loss,
                "accuracy": trainer.progress.accuracy,
                "images_per_s": self.count / seconds if seconds else 0.0,
                "num_nonfinite": trainer.num_nonfinite,
            }
            | more
        )


def _ledger_entry(epoch: int, step: int, position: int) -> int:
    """A number that stands for 'this position was consumed at this step of this epoch'; sums of them, modulo 2⁶², tell
    whether two runs consumed the same samples, whoever read them and in whichever order."""
    mixed = (epoch + 1) * 0x9E3779B97F4A7C15 ^ (step + 1) * 0xC2B2AE3D27D4EB4F ^ (position + 1) * 0x165667B19E3779F9
    mixed = (mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9
    return (mixed ^ (mixed >> 27)) & (2**40 - 1)


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _sum(value: int) -> int:
    return sum(_gathered(value))


def _from_rank_zero(read: Any) -> Any:
    """What rank 0 reads, on every rank: two ranks that asked the store apart could see two different moments."""
    box = [read() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()
