"""A run as an object of Python: it learns tasks, answers images and is evaluated in this process, without Ray, or on a
cluster when it is given one.

It is the run that `diki-ray continual` learns: the same store, keys and bytes of modules. The run's storage is all its
state, so what another process learns is seen here, and the lease is held only while something is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from diki_ray.answering.class_features import Exact, Tabulated
from diki_ray.answering.image_answers import Answer
from diki_ray.config import Config, load, parse
from diki_ray.config.places import absolute
from diki_ray.config.run import TaskSection
from diki_ray.data.in_memory import prepared
from diki_ray.data.prepare import Settings
from diki_ray.errors import ConfigError, DataError
from diki_ray.prediction.bundle import Model, export_bundle
from diki_ray.prediction.run_predictor import RunPredictor, load_method, predictor_over, read_modules
from diki_ray.report.results import DOCUMENT
from diki_ray.runs import in_process, steps
from diki_ray.runs.changed_data import with_former_modules
from diki_ray.runs.plan import Plan, fitted, is_sequential, load_backbone, make_plan, shared_by_keys
from diki_ray.runs.progress import Display
from diki_ray.runs.stored_run import check_backbone, config_of, named_tasks, open_learnt
from diki_ray.store.files import join
from diki_ray.store.interface import HeldRun, ReadableRun
from diki_ray.store.objects import Objects
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore

_ANY_TASK = {"data": "embedded:digits"}
"""A configuration has a task; this one stands for those that are not learnt yet."""


class ContinualModel:
    """A frozen CLIP that learns one task after another and forgets none.

    run, storage: the run's name and where it lies; it is opened, or created by the first `learn`.
    config: settings as `diki-ray continual` takes them, in a YAML file or a dict of sections; tasks in it are left to
        `learn`. By default those of the run, and for a new run the defaults.
    address: of a Ray cluster, which then trains and evaluates; data and storage must lie where its nodes see them.
    verbose: False prints nothing.
    """

    def __init__(
        self,
        run: str,
        storage: str | Path = "storage",
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        address: str | None = None,
        verbose: bool = True,
    ) -> None:
        self.run, self.storage = run, Objects.open(str(storage)).uri
        given = load(config).model_dump(exclude_unset=True) if isinstance(config, str | Path) else dict(config or {})
        self._is_configured = config is not None
        self._settings = parse(
            given
            | {
                "run": {**given.get("run", {}), "name": run, "storage": self.storage},
                "data": {"root": join(self.storage, "prepared"), **given.get("data", {})},
                "cluster": {**given.get("cluster", {}), "address": address},
                "tasks": [_ANY_TASK],
            }
        ).model_copy(update={"tasks": ()})
        self._quiet = not verbose
        self._predictor: tuple[tuple[str, ...], RunPredictor] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks learnt, in order."""
        return tuple(entry.task for entry in RunStore.open(self.storage, self.run).modules())

    @property
    def classes_(self) -> tuple[str, ...]:
        """All class names learnt, task by task."""
        return self._model().class_names

    @property
    def results_(self) -> dict[str, Any] | None:
        """The document of the last evaluation, here or by `continual`; None before the first."""
        return RunStore.open(self.storage, self.run).get_document(DOCUMENT)

    @property
    def config(self) -> Config:
        """The run's configuration as it is now; `config.to_yaml()` is a file for `diki-ray continual --config`."""
        return self._config(RunStore.open(self.storage, self.run))

    def learn(
        self,
        data: Any,
        labels: Sequence[Any] | None = None,
        *,
        name: str | None = None,
        class_names: Sequence[str] = (),
        template: str | None = None,
        shots: int | None = None,
    ) -> ContinualModel:
        """Learns a task and returns the model. Learning the same task again does nothing; when it was interrupted, it
        goes on from the last checkpoint.

        data: a folder, manifest or prepared data set (whatever `tasks.data` of a configuration may be), or images in
            memory, with `labels` or as a torch Dataset (`memory_dataset`). A part of it is kept for validation and
            for the test where it has no such splits.
        name: of the task; the folder's by default.
        class_names: of the labels 0, 1, …, where data do not name them.
        template: the caption of a class, with {} for its name.
        shots: training images a class; all by default.

        Raises:
            DataError: data that cannot be learnt from. ConfigError: other settings or another task of this name.
            LeaseHeldError: another process writes this run.
        """
        config = self.config
        index = prepared(
            data,
            labels,
            absolute(config.data.root),
            name=name,
            class_names=class_names,
            template=template,
            settings=Settings(shots, config.run.seed),
        )
        display = Display(Console(quiet=self._quiet))
        with self._place.held(config) as store:
            config = steps.with_parts_of_the_run(self._config(store))
            if config.protocol != "own":
                raise ConfigError(f"run {self.run!r} has the tasks of {config.protocol}: learn yours in another run.")
            section = {"data": index.uri, "name": name or index.name, "template": template}
            (new,) = parse(config.model_dump() | {"tasks": [section]}).tasks
            stream = {task.name: task for task in (*config.tasks, new)}
            # Learning needs the data of no earlier task, unless its module builds on the one before.
            plan = self._plan(config, stream.values() if is_sequential(config) else [new], store)
            (task,) = (task for task in plan.tasks if task.name == new.name)
            if any(entry.task == task.name and entry.key != task.key for entry in store.modules()):
                raise ConfigError(
                    f"run {self.run!r} has learnt another task {task.name!r}, of other images, names or settings: "
                    "give this one another name=, or remove that one first."
                )
            steps.learn(plan, store, self._place, display, [display])
            whole = plan.config.model_copy(update={"tasks": tuple(stream.values())})
            store.put_document(CONFIG_DOCUMENT, whole.to_yaml())
        return self

    def predict(
        self, images: Iterable[Any], classes: Sequence[str] | None = None, template: str = "a photo of a {}."
    ) -> np.ndarray:
        """The class name of each image, in an array of text [N]; see `answers`."""
        return np.array([answer.class_name for answer in self.answers(images, classes, template)], dtype=str)

    def answers(
        self, images: Iterable[Any], classes: Sequence[str] | None = None, template: str = "a photo of a {}."
    ) -> list[Answer]:
        """Each image's class name with its confidence and the task that answered; arguments and errors are those of
        `Model.predict`. Class features are interpolated as in evaluation (`evaluate.text_grid`)."""
        return self._model().predict(images, classes, template)

    def evaluate(self) -> dict[str, float]:
        """Accuracy (0 to 1) on each task's test images, with all that is learnt. The whole matrix, zero-shot and
        metrics are in `results_`, and the report in the run's storage. What is unchanged is not computed again.

        Raises:
            ConfigError: nothing is learnt. DataError: data that cannot be read, or are not what was learnt from.
            LeaseHeldError: another process writes this run.
        """
        open_learnt(self.storage, self.run)
        display, started = Display(Console(quiet=self._quiet)), time.monotonic()
        with self._place.held(self.config) as store:
            config = steps.with_parts_of_the_run(self._config(store))
            plan = self._plan(config, config.tasks, store)
            if other := plan.pending([entry.key for entry in store.modules()]):
                raise DataError(
                    f"the module of task {other[0].name!r} was not learnt from the data at {other[0].index.uri}: put "
                    "those back, or remove the task and learn it again."
                )
            results = steps.unchanged_results(plan, store) or steps.evaluate(
                plan,
                store,
                self._place,
                display,
                [display],
                seconds=lambda: {"evaluate": time.monotonic() - started},
                trained=(),
                command=f"{self!r}.evaluate()",
            )
        return dict(zip([t["name"] for t in results["tasks"]], results["accuracy"][-1], strict=True))

    def remove(self, task: str) -> None:
        """Takes a task out: the model is then exactly what it would be without it.

        Raises:
            UserError: there is no such task. LeaseHeldError: another process writes this run.
        """
        with in_process.held(self._settings) as store:
            store.remove_task(task)
            if (config := self._config(store)).tasks:
                store.put_document(CONFIG_DOCUMENT, config.to_yaml())

    def save(self, folder: str | Path) -> None:
        """Writes all that was learnt into a folder, which `diki_ray.load` opens without the storage."""
        export_bundle(self.storage, self.run, str(folder), self.config)

    def __repr__(self) -> str:
        return f"ContinualModel({self.run!r}, {self.storage!r})"

    @property
    def _place(self) -> steps.Workplace:
        if self._settings.cluster.address is None:
            return in_process.IN_PROCESS
        from diki_ray.runs.on_ray import ON_RAY  # Ray, which this process does not need

        return ON_RAY

    def _config(self, store: ReadableRun) -> Config:
        """The settings, with the tasks that the run has learnt."""
        stored = self._stored_config()
        if stored is None:
            if store.modules() and not self._is_configured:
                raise ConfigError(f"run {self.run!r} has no configuration yet: give config=, as it was begun with.")
            return self._settings
        learnt = {entry.task for entry in store.modules()}
        tasks = tuple(task for task in named_tasks(stored) if task.name in learnt)
        if self._is_configured:
            return self._settings.model_copy(update={"tasks": tasks})
        run = self._settings.run.model_copy(update={"seed": stored.run.seed})
        return stored.model_copy(update={"tasks": tasks, "run": run, "cluster": self._settings.cluster})

    def _stored_config(self) -> Config | None:
        run = RunStore.open(self.storage, self.run)
        if run.get_document(CONFIG_DOCUMENT) is None:
            return None
        return config_of(run, backbone=self._settings.backbone if self._is_configured else None)

    def _plan(self, config: Config, tasks: Iterable[TaskSection], store: HeldRun) -> Plan:
        """The plan of some tasks.

        Raises:
            ConfigError: the run was learnt on another backbone or with other settings.
        """
        backbone, stored = load_backbone(config), self._stored_config()
        plan = with_former_modules(make_plan(config.model_copy(update={"tasks": tuple(tasks)}), backbone), store)
        check_backbone(RunStore.open(self.storage, self.run), backbone.name, plan.backbone_digest)
        if stored is not None and store.modules():
            before = fitted(steps.with_parts_of_the_run(stored), backbone)
            own, others = (shared_by_keys(c, plan.backbone_digest) for c in (plan.config, before))
            if changed := [field for field in own if own[field] != others.get(field)]:
                raise ConfigError(
                    f"run {self.run!r} was learnt with other settings ({', '.join(changed)}): leave config out to go "
                    "on with its own, or give the new run another name."
                )
        return plan

    def _model(self) -> Model:
        """The model of all that is learnt, made anew when the run has changed."""
        store = open_learnt(self.storage, self.run)
        config = self.config
        version = (config.digest(), *(entry.digest for entry in store.modules()))
        if self._predictor is None or self._predictor[0] != version:
            config, method = load_method(store, config)
            grid = config.evaluate.text_grid
            features = Tabulated(grid) if grid else Exact()
            self._predictor = (version, predictor_over(config, method, read_modules(store), features))
        return Model(self.run, self._predictor[1])
