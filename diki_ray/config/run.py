"""The configuration: one typed, frozen tree, read from YAML with dotted overrides (`train.epochs=3`).

Every field says its unit and what its default means. An unknown key, a wrong type or a value out of range is an error
that names the field, the value and what is allowed. The resolved tree and its hash travel with each result. What a
field affects is in its type (diki_ray/config/affects.py).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from diki_ray.config.affects import Affects, ChangesAnswers, ChangesModule, ChangesNothing, StoredAs, settings
from diki_ray.config.class_model import ClassModelSection, RoutingSection
from diki_ray.config.methods import DikiSection, MethodSection
from diki_ray.config.protocols import EMBEDDED, protocol
from diki_ray.config.section import Section
from diki_ray.config.templates import template_fault
from diki_ray.errors import DataError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Run and task names are parts of paths, of actor names and of metric labels."""


class RunSection(Section):
    """Where a run lives. The same name on the same storage is the same run: it is continued."""

    name: ChangesNothing[str] = Field(pattern=NAME)
    storage: ChangesNothing[str] = "storage"
    """A local folder, or s3://, gs://, az:// and a prefix. Modules are shared by all runs of one storage."""
    seed: ChangesModule[int] = Field(default=0, ge=0)
    take_over: ChangesNothing[bool] = False
    """True: take the run from another driver that still holds it; the other one's later writes are refused."""


class BackboneSection(Section):
    """The frozen CLIP."""

    name: ChangesModule[str] = "embedded"
    """`embedded` (the tiny CLIP of this package), an open_clip model (docs/backbones.md), `local-dir:` and a folder in
    open_clip's layout, or a Python file with create(directory)."""
    pretrained: ChangesModule[str | None] = None
    """open_clip's tag of the weights, or a local file of weights."""
    directory: ChangesModule[str | None] = None
    """Given to create(directory), the file's own folder by default; or the local folder of the tokenizer's files, for
    an open_clip model with a Hugging Face tokenizer."""
    precision: ChangesModule[Literal["auto", "float32", "bfloat16"]] = "auto"
    """The frozen weights and their activations have this precision; auto: bfloat16 on a GPU, float32 on a CPU."""


class TrainSection(Section):
    """How a task is trained. Published: SGD, lr 5.0, cosine to lr/1000, batch 128, 10 epochs."""

    optimizer: ChangesModule[Literal["sgd", "adamw"]] = "sgd"
    lr: ChangesModule[float] = Field(default=5.0, gt=0)
    final_lr_fraction: ChangesModule[float] = Field(default=1e-3, ge=0, le=1)
    weight_decay: ChangesModule[float] = Field(default=0.0, ge=0)
    """adamw only."""
    epochs: ChangesModule[int] = Field(default=10, ge=1)
    min_steps: ChangesModule[int] = Field(default=0, ge=0)
    """A task whose epochs have fewer steps than this in all is trained for more epochs. Small tasks need this: at 16
    images a class, ten epochs of ten classes have a tenth of the steps of ten epochs of a hundred classes."""
    batch_size: ChangesModule[int] = Field(default=128, ge=1)
    """Images in a global batch, over all workers."""
    changed_data: ChangesAnswers[Literal["retrain", "keep"]] = "retrain"
    """What happens to the trained parameters of a task whose images or classes have changed since the run learnt it.
    retrain: they are trained again from all images. keep: they stay. In both cases the task's sums, and so routing and
    the class model, follow the changed images."""
    num_parts: Annotated[ChangesModule[int | None], StoredAs("num_workers")] = Field(default=None, ge=1)
    """A step is computed in this many parts. Any number of workers up to it trains the same module, bit for bit. Not
    set: the number that the run was begun with, or num_workers for a new run. Keys and provenance store it under the
    name num_workers."""
    num_workers: ChangesNothing[int] = Field(default=1, ge=1)
    """Data-parallel workers; those above num_parts are not started."""
    min_workers: ChangesNothing[int | None] = Field(default=None, ge=1)
    """Elastic: start with as few as these where nodes are missing, go on with fewer when one is lost, and take up to
    num_workers when nodes come (docs/reliability.md)."""
    resize_every_s: ChangesNothing[float] = Field(default=60.0, gt=0)
    """With min_workers: seconds between looks for room for more workers. Taking them costs a restart of the group."""
    num_streams: ChangesModule[int] = Field(default=24, ge=1)
    """Virtual streams; any number of workers up to it reads the same global batches."""
    device: ChangesModule[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: cuda where this machine has it."""
    strategy: ChangesNothing[Literal["ddp", "deepspeed"]] = "ddp"
    """How the frozen weights are held. ddp: whole on every worker. deepspeed: sharded over the workers (ZeRO-3), for
    backbones that one worker cannot hold. The modules of both agree up to rounding and have the same key."""
    offload: ChangesNothing[bool] = False
    """deepspeed on GPUs: the shares lie in the CPU's memory."""
    cpus_per_worker: ChangesNothing[float] = Field(default=1.0, gt=0)
    activation_checkpointing: ChangesNothing[bool] = False
    """True: only each block's input is kept for the backward pass, and the block is computed again there. This takes
    less memory and more time, for large towers. The module is the same: to the bit on a CPU,
    up to rounding elsewhere."""
    compile: ChangesNothing[bool] = False
    """True: both towers go through torch.compile. This takes a minute at the start of a worker and rounds differently
    (1e-5). Whether it is faster depends on the device, see docs/benchmarks.md."""
    checkpoint_every_steps: ChangesNothing[int] = Field(default=50, ge=1)
    """Steps between mid-task checkpoints; steps and not seconds, so that every worker agrees without asking."""
    max_failures: ChangesNothing[int] = Field(default=3, ge=-1)
    """Worker-group restarts before the run stops with the error; -1: no limit."""
    collective_timeout_s: ChangesNothing[int] = Field(default=120, ge=1)
    """Seconds after which a worker that hangs is noticed by the others, and the group restarted."""
    max_nonfinite_steps: ChangesModule[int] = Field(default=3, ge=1)
    """Batches in a row with a loss or gradient that is not finite before training stops."""

    @property
    def parts(self) -> int:
        """num_parts as it is used."""
        return self.num_workers if self.num_parts is None else self.num_parts

    @property
    def most_workers(self) -> int:
        """Returns how many workers are started."""
        return min(self.num_workers, self.parts)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}, which is the most there "
                "will be; lower train.min_workers"
            )
        if self.parts > self.num_streams:
            name = "num_workers" if self.num_parts is None else "num_parts"
            raise ValueError(
                f"{name}={self.parts} is more than num_streams={self.num_streams}: every worker reads at least one "
                "stream; raise train.num_streams"
            )
        if (self.compile or self.activation_checkpointing) and self.strategy == "deepspeed":
            raise ValueError("compile and activation_checkpointing are for strategy=ddp; with deepspeed leave them out")
        if self.offload and self.strategy != "deepspeed":
            raise ValueError("offload is for strategy=deepspeed; with ddp leave it out")
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError("weight_decay is for optimizer=adamw; with sgd leave it at 0")
        return self


class DataSection(Section):
    """Where data sets come from and prepared shards are kept, and how bad samples are dealt with."""

    sources: ChangesNothing[str | None] = None
    """With a protocol: the folder that holds its data sets' folders."""

    root: ChangesNothing[str] = "prepared"
    """Folder of the data sets that are prepared on first use (embedded tasks, image folders)."""
    max_skipped_fraction: ChangesNothing[float] = Field(default=0.01, ge=0, le=1)
    """Share of a split's samples that may be skipped as unreadable before it is an error."""
    num_threads: ChangesNothing[int] = Field(default=2, ge=1)
    """Threads of a worker that decode images."""


class StatisticsSection(Section):
    """The Gaussians, as they are read from the moments."""

    covariance_eps: ChangesAnswers[float] = Field(default=1e-7, gt=0)
    shrinkage: ChangesAnswers[Literal["none", "oas", "ledoit_wolf"]] = "none"


class CalibrationSection(Section):
    """How a log density becomes the integration weight.

    published: sigmoid(s / scale + bias), where s is the log density. validated: sigmoid(slope · z + bias), where z is
    the log density standardised over the task's own validation images.
    """

    form: ChangesAnswers[Literal["published", "validated"]] = "published"
    scale: ChangesAnswers[float | None] = Field(default=None, gt=0)
    """published; the backbone's embedding dimension by default (512 for ViT-B/16)."""
    slope: ChangesAnswers[float] = Field(default=1.0, gt=0)
    """validated."""
    bias: ChangesAnswers[float | None] = None
    """-1 for published (as the paper has it), 4 for validated by default."""


class EvaluateSection(Section):
    """How the accuracy matrix is computed."""

    routing: ChangesAnswers[Literal["image", "batch"]] = "image"
    """image: each image for itself. batch: the published code's vote over batches of one data set."""
    label_space: ChangesAnswers[Literal["task", "seen", "all"]] = "task"
    """task: the classes of the data set under test (MTIL). seen: all learnt so far (ODCL-CIL). all: X-TAIL."""
    batch_size: ChangesAnswers[int] = Field(default=256, ge=1)
    """Images in a canonical batch. Under routing=batch it is part of the result (published: 256)."""
    text_grid: ChangesAnswers[int] = Field(default=33, ge=0)
    """Weights at which class features are tabulated; 0: exact for every image."""
    skip_weight: ChangesAnswers[float] = Field(default=0.0, ge=0, le=1)
    """Images with a lower weight get the frozen model's answer without a residual pass; 0: off."""
    num_workers: ChangesNothing[int] = Field(default=1, ge=1)
    cpus_per_worker: ChangesNothing[float] = Field(default=1.0, gt=0)

    @field_validator("text_grid")
    @classmethod
    def _grid(cls, value: int) -> int:
        if value == 1:
            raise ValueError("1 point is no grid: give at least 2, or 0 for exact")
        return value


class ScheduleSection(Section):
    """Which tasks are trained at the same time. Tasks are independent: the modules are the same either way."""

    concurrent_tasks: ChangesNothing[int] = Field(default=1, ge=1)
    """Worker groups side by side, where the cluster has room for them; each goes through its share of the tasks."""


class ClusterSection(Section):
    """The Ray cluster. Without an address the job starts its own on this machine and stops it at the end; under
    `ray job submit` it joins the cluster that runs it."""

    address: ChangesNothing[str | None] = None
    num_cpus: ChangesNothing[int | None] = Field(default=None, ge=1)
    """The cluster started here has so many CPUs; by default as many as the machine."""


class TelemetrySection(Section):
    """What is shown while a run goes on."""

    port: ChangesNothing[int | None] = Field(default=None, ge=1, le=65535)
    """Prometheus metrics are served here on `host`; off by default."""
    host: ChangesNothing[str] = "127.0.0.1"
    linger_s: ChangesNothing[float] = Field(default=0.0, ge=0)
    """Seconds that the metrics stay after the end, so that a last scrape sees the final values."""
    trackers: ChangesNothing[tuple[Literal["tensorboard", "mlflow", "wandb"], ...]] = ()
    """Experiment trackers that `diki-ray continual` tells of the run; each needs the extra of its name. To look:
    `tensorboard --logdir tracking/tensorboard`, `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri
    tracking/mlruns` (of the whole `mlflow`), `wandb sync tracking/wandb/offline-run-*`."""
    tracking_root: ChangesNothing[str] = "tracking"
    """The local folder of their files."""


class TaskSection(Section):
    """One task of the stream."""

    data: ChangesModule[str]
    """`embedded:NAME`, a prepared data set (folder with index.json, local or remote, whose digest may be left out where
    it is the only one of its name: `prepared/pets`), or a folder in a known layout."""
    name: ChangesAnswers[str | None] = Field(default=None, pattern=NAME)
    """The data set's own name by default."""
    template: ChangesModule[str | None] = None
    """The caption of a class, with {} for its name; the data set's own by default."""
    shots: ChangesModule[int | None] = Field(default=None, ge=1)
    """Training images a class; all by default."""
    split: ChangesModule[Literal["coop", "zscl"] | None] = None
    """For data sets of the benchmarks: whose train, val and test; coop by default."""

    @field_validator("template")
    @classmethod
    def _has_place(cls, value: str | None) -> str | None:
        if value is not None and (fault := template_fault(value)) is not None:
            raise ValueError(f"a template {fault}")
        return value


class Config(Section):
    """The whole tree."""

    run: RunSection
    tasks: ChangesModule[tuple[TaskSection, ...]] = Field(default=(), max_length=5_000)
    """The tasks of the stream, in order. If none are given, they are the protocol's, from data.sources."""
    backbone: BackboneSection = BackboneSection()
    method: MethodSection = DikiSection()
    """What learns a task: `name`, and that method's own settings."""
    train: TrainSection = TrainSection()
    data: DataSection = DataSection()
    statistics: StatisticsSection = StatisticsSection()
    calibration: CalibrationSection = CalibrationSection()
    routing: RoutingSection = RoutingSection()
    class_model: ClassModelSection = ClassModelSection()
    evaluate: EvaluateSection = EvaluateSection()
    schedule: ScheduleSection = ScheduleSection()
    cluster: ClusterSection = ClusterSection()
    telemetry: TelemetrySection = TelemetrySection()
    protocol: ChangesAnswers[str] = "own"
    """The benchmark that is run, with its split, as in `mtil-1/coop`; results carry it with the routing."""

    @model_validator(mode="after")
    def _tasks_or_protocol(self) -> Self:
        if self.protocol == "own":
            if not self.tasks:
                raise ValueError("tasks: there are none; list at least one, or name a protocol with data.sources")
            return self
        name, _, split = self.protocol.partition("/")
        try:
            known = protocol(name)
            known.full_id(split, self.evaluate.routing)
        except DataError as error:
            written = "NAME/coop or NAME/zscl, or NAME/embedded where the data are drawn"
            raise ValueError(f"protocol: {error}; write {written}") from error
        if self.tasks or (self.data.sources is None) != (split == EMBEDDED):
            place = "data.sources out" if split == EMBEDDED else "set data.sources to their folder"
            raise ValueError(f"protocol {name} has its own tasks: leave tasks out, and {place}")
        if self.evaluate.label_space != known.label_space:
            raise ValueError(f"protocol {name} is evaluated with evaluate.label_space={known.label_space}")
        return self

    @model_validator(mode="after")
    def _class_model_routes(self) -> Self:
        if self.method.name == "classes" and self.routing.density != "classes":
            raise ValueError("method.name=classes answers by the class model; leave routing.density=task out")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        twice = [n for n, k in Counter(t.name for t in self.tasks if t.name).items() if k > 1]
        if twice:
            raise ValueError(f"tasks: two tasks are named {twice[0]!r}; every task needs a name of its own")
        return self

    def digest(self) -> str:
        """sha256 (hex) of what decides the numbers: the settings that change modules or answers.

        Those at their default are left out, so that a setting that comes new, with a default that leaves everything as
        it was, changes no digest. For the same reason a default must not change (tests/unit/test_affects.py).
        """
        deciding = settings(self, Affects.MODULE, Affects.ANSWER, defaults=False)
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
