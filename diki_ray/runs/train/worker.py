"""One worker's way through its tasks, each from its newest checkpoint to the commit of its module.

Workers know the store by its actor's name and never touch storage themselves. What is committed, and the newest good
checkpoint of a task under way, are the store's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.recomputation import recompute_activations
from diki_ray.clip.sharded import shard
from diki_ray.config import Config
from diki_ray.data.stream import TrainStream
from diki_ray.data.to_device import on_device
from diki_ray.learning.collective import (
    all_reduce_sum,
    barrier,
    from_rank_zero,
    gather_objects,
    rank,
    sum_over_ranks,
)
from diki_ray.learning.methods import Method
from diki_ray.learning.methods.base import tensors_of
from diki_ray.learning.module import TaskModule, read_tensors, write_tensors
from diki_ray.learning.task_trainer import TaskTrainer
from diki_ray.runs.plan import PlannedTask, build_method, load_backbone, precision_of, recipe_of
from diki_ray.runs.train.assembly import assembled, first_sums
from diki_ray.runs.train.cost import Cost, CostMeter, merged
from diki_ray.runs.train.observers import ConsumedSamples, Observer, Observers, ProgressReports, Training
from diki_ray.runs.train.replay import Memory
from diki_ray.runs.train.task_data import TaskData
from diki_ray.store.interface import HeldRun

DRAIN_CHECK_EVERY_STEPS = 4
"""Asking whether a node is to be taken away waits for every rank; the notice comes half a minute ahead or more."""


def learn_all(
    tasks: Sequence[PlannedTask],
    config: Config,
    store: HeldRun,
    device: str | torch.device,
    observers: Sequence[Observer] = (),
    draining: Callable[[], bool] = lambda: False,
) -> None:
    """Learns the tasks one after another and commits each: in every worker of a group, or as the only worker in the
    caller's process. It sets the process's number of threads to `train.cpus_per_worker`, which modules depend on.

    Raises:
        UserError: what the user can put right; what was committed before stays.
    """
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    worker = TaskWorker(config, build_method(config, _backbone(config, device)), store, observers, draining)
    for task in tasks:
        worker.learn(task)


def _backbone(config: Config, device: str | torch.device) -> Backbone:
    """The backbone as it is trained on."""
    backbone = load_backbone(config).to(device, precision_of(config))
    if config.train.strategy == "deepspeed":
        shard(backbone, config.train.offload)
    if config.train.compile:
        backbone = backbone.compile()
    if config.train.activation_checkpointing:
        for tower in backbone.towers:
            recompute_activations(tower)
    return backbone


@dataclass
class TaskWorker:
    """One of the workers that train tasks together; plain but for the store it is given, so it also runs without Ray
    Train."""

    config: Config
    method: Method
    store: HeldRun
    observers: Sequence[Observer] = ()
    """Told of every task, after the ledger of consumed samples and the progress reports."""
    draining: Callable[[], bool] = lambda: False
    """Whether a node of this group is about to be taken away; called by every rank, with one answer for all."""

    def learn(self, task: PlannedTask) -> None:
        """Trains, takes the statistics of, and commits one task; nothing when its module is already there."""
        if from_rank_zero(lambda: self.store.has_module(task.key)):
            return
        meter = CostMeter(self.method.backbone.device)
        data = TaskData(self.config, task, self.method.backbone)
        observers = Observers([ConsumedSamples(), ProgressReports(self.store), *self.observers])
        former = self._module(task.former.key) if task.former is not None else None
        memory = self._recalled(task)
        training = Training(task, self._trainer(task, former))
        if not self._resume(training, observers) and task.num_epochs and self.method.looks_first:
            training.trainer.begin(first_sums(data, training.trainer))
        num_skipped = self._train(training, data, observers) if training.trainer.parameters else 0
        module = assembled(data, training.trainer, observers.recorded(), num_skipped, former)
        if memory is not None:
            module = memory.with_exemplars(module, data, self.method)
        cost = merged(gather_objects(meter.read()))
        if rank() == 0:
            self._commit(training, module, cost, observers)
        barrier()  # nobody starts the next task before this one is durable: a crash then leaves at most one open

    def _trainer(self, task: PlannedTask, former: TaskModule | None) -> TaskTrainer:
        """The trainer at the beginning of its task; with the parameters of a former module, at the end of it."""
        generator = torch.Generator().manual_seed(task.seed)
        num_batches = -(-task.index.split("train").num_samples // self.config.train.batch_size)
        return TaskTrainer(
            self.method,
            self.method.backbone.tokenize(task.class_names, task.templates[0]),
            recipe_of(self.config),
            num_steps=task.num_epochs * num_batches,
            parameters=tensors_of(former)
            if former is not None and task.former is not None and task.former.keeps_parameters
            else self.method.starting(generator, task.class_names, self._predecessor(task)),
            seed=task.seed,
            num_parts=self.config.train.parts,
        )

    def _predecessor(self, task: PlannedTask) -> TaskModule | None:
        return None if task.predecessor is None else self._module(task.predecessor)

    def _recalled(self, task: PlannedTask) -> Memory | None:
        """What a method that replays has of the tasks before; the method gets it."""
        settings = getattr(self.config.method, "replay", None)
        if settings is None:
            return None
        memory = Memory.before(task.predecessor, settings, self._module)
        self.method.replay = memory.replay(self.method)
        return memory

    def _module(self, key: str) -> TaskModule:
        """The module is the run's, else the library's: in a sweep another run may have trained the tasks before."""
        return TaskModule.from_bytes(self.store.module_by_key(key))

    def _resume(self, training: Training, observers: Observer) -> bool:
        """Goes on from the newest good checkpoint; False where there is none."""
        saved = from_rank_zero(lambda: self.store.load_checkpoint(training.task.key))
        if saved is not None:
            header, arrays = read_tensors(saved[1])
            training.trainer.load_state(header, arrays)
            observers.on_resume(header)
        return saved is not None

    def _train(self, training: Training, data: TaskData, observers: Observer) -> int:
        """All epochs that are left; returns how many samples all ranks skipped."""
        stream = data.train_stream()
        first_epoch, first_batch = divmod(training.trainer.progress.step, stream.num_batches)
        for epoch in range(first_epoch, training.task.num_epochs):
            self._steps(training, stream, epoch, first_batch if epoch == first_epoch else 0, observers)
            self._end_epoch(training, data, epoch, observers)
        return sum_over_ranks(stream.ledger.total)

    def _steps(
        self, training: Training, stream: TrainStream, epoch: int, first_batch: int, observers: Observer
    ) -> None:
        """The steps of an epoch from a batch on, with the checkpoints between them."""
        trainer = training.trainer
        observers.before_epoch(training, epoch)
        parts = on_device(stream.epoch(epoch, first_batch), self.method.backbone.device)
        while batch := tuple(islice(parts, len(stream.parts))):
            observers.before_step(training, batch)
            keys = tuple(key for part in batch for key in part.keys)
            result = trainer.step_in_parts([(part.images, part.labels) for part in batch], keys)
            observers.after_step(training, batch, result.num_samples)
            if batch[0].step + 1 < stream.num_batches and self._checkpoint_is_due(trainer.progress.step):
                self._checkpoint(training, observers)

    def _end_epoch(self, training: Training, data: TaskData, epoch: int, observers: Observer) -> None:
        """Validation, and a checkpoint unless the module comes next."""
        validation = self._validate(training.trainer, data)
        observers.after_epoch(training, epoch, validation)
        training.trainer.end_epoch(epoch, validation)
        if epoch + 1 < training.task.num_epochs:
            self._checkpoint(training, observers)

    def _validate(self, trainer: TaskTrainer, data: TaskData) -> float | None:
        """Accuracy on the validation split with the task's own module at w = 1; None without such a split."""
        if "val" not in data.task.index.splits:
            return None
        class_features = trainer.class_features()
        correct = count = 0
        for images, labels in chain.from_iterable(data.part_of("val", part) for part in data.own_parts):
            correct += trainer.num_correct(images, labels, class_features)
            count += len(labels)
        total = all_reduce_sum(torch.tensor([correct, count], dtype=torch.float64, device=trainer.device))
        return float(total[0] / total[1])

    def _checkpoint_is_due(self, step: int) -> bool:
        if step % self.config.train.checkpoint_every_steps == 0:
            return True
        return step % DRAIN_CHECK_EVERY_STEPS == 0 and self.draining()

    def _checkpoint(self, training: Training, observers: Observer) -> None:
        """Saves the state, the same on every rank; rank 0 writes it."""
        recorded = observers.recorded()
        if rank() == 0:
            trainer = training.trainer
            header, arrays = trainer.state()
            blob = write_tensors(header | recorded, arrays)
            observers.before_checkpoint(training)
            self.store.save_checkpoint(training.task.key, trainer.progress.step, blob)
            observers.after_checkpoint(training)

    def _commit(self, training: Training, module: TaskModule, cost: Cost, observers: Observer) -> None:
        metadata = {
            "task": module.task,
            "num_classes": len(module.class_names),
            "method": module.method,
            "cost": cost,  # of the attempt that committed it
            "world_sizes": training.trainer.progress.world_sizes,  # who trained it, which changes no bit of it
        }
        if (former := training.task.former) is not None:
            metadata |= {"former": former.key, "parameters_kept": former.keeps_parameters}
            if former.difference is not None:
                metadata |= {"added": len(former.difference.added), "removed": len(former.difference.removed)}
        blob = module.to_bytes()
        observers.before_commit(training)
        self.store.commit_module(module.key, module.task, blob, metadata)
        observers.after_commit(training)
        self.store.drop_checkpoints(module.key)
