"""Experiment trackers that people already use, fed by a run's own events: TensorBoard, MLflow, Weights & Biases.

Every tracker gets the same series: `<task>/loss`, `accuracy`, `images_per_s` and `validation_accuracy` by training
step; at the end `matrix/<task>`, the accuracy on its test set by the number of tasks learnt (0: zero-shot), and
`summary/<metric>`, the means over tasks. All of it stays below `telemetry.tracking_root`, unless MLFLOW_TRACKING_URI or
WANDB_MODE say otherwise. The same run with the same configuration goes on where it was.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from diki_ray.config import Config
from diki_ray.errors import ConfigError

PROJECT = "diki_ray"
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""The module that each tracker needs; the extra of this package that brings it has the tracker's name."""
Series = Mapping[str, float]


class Tracker(Protocol):
    """One tracker, open for one run."""

    def write(self, values: Series, step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `<root>/tensorboard/<run>`; `tensorboard --logdir <root>/tensorboard` shows them."""

    def __init__(self, config: Config, root: Path, labels: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(root / "tensorboard" / config.run.name))
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}```")
        self._writer.add_text("run", "  \n".join(f"{name}: {value}" for name, value in labels.items()))

    def write(self, values: Series, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment `diki_ray`, in the file store `<root>/mlruns` or where MLFLOW_TRACKING_URI says."""

    def __init__(self, config: Config, root: Path, labels: Mapping[str, str]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would rather have a data base
            uri = (root / "mlruns").resolve().as_uri()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        same = " and ".join(f"tags.{name} = '{value}'" for name, value in labels.items())
        found = self._client.search_runs([number], filter_string=same)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, tags=dict(labels), run_name=config.run.name).info.run_id
        for name, value in flat(config.model_dump(mode="json")).items():
            self._client.log_param(self._id, name, value)

    def write(self, values: Series, step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class WandB:
    """A run of the project `diki_ray`; offline in `<root>/wandb`, for `wandb sync`, unless WANDB_MODE is set."""

    def __init__(self, config: Config, root: Path, labels: Mapping[str, str]) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=config.run.name,
            id=f"{config.run.name}-{labels['config_digest'][:8]}",
            dir=root,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=config.model_dump(mode="json") | dict(labels),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, values: Series, step: int) -> None:
        # Its own step must grow, and every task counts from 0: each group of series has an axis of its own.
        groups = {name.rpartition("/")[0] for name in values}
        for group in groups:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({**values, **{f"{group}/step": step for group in groups}})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


Open = Callable[[Config, Path, Mapping[str, str]], Tracker]
TRACKERS: dict[str, Open] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


class Tracking:
    """The open trackers of a run: a Listener of its progress (`progress.following`). One that fails is left out from
    then on, and said; a run is not lost for its plots."""

    def __init__(self, trackers: dict[str, Tracker], say: Callable[[str], None]) -> None:
        self._trackers, self._say = trackers, say

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] not in ("step", "epoch"):
            return
        task = event["task"]
        names = ("loss", "accuracy", "images_per_s", "validation_accuracy")
        self._write({f"{task}/{n}": event[n] for n in names if event.get(n) is not None}, event["step"])

    def on_results(self, results: Mapping[str, Any]) -> None:
        """The matrix and its means, from results.json."""
        names = [task["name"] for task in results["tasks"]]
        for stage, row in enumerate([results["zero_shot"], *results["accuracy"]]):
            self._write({f"matrix/{name}": value for name, value in zip(names, row, strict=True)}, stage)
        means = {name: metric["mean"] for name, metric in results["metrics"].items()}
        self._write({f"summary/{name}": mean for name, mean in means.items() if mean is not None}, len(names))

    def close(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed))

    def _write(self, values: Series, step: int) -> None:
        self._each(lambda tracker: tracker.write(values, step))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._trackers[name]
                first = (str(error).splitlines() or ["no message"])[0]
                self._say(f"{name} is no longer told of this run ({type(error).__name__}: {first})")


@contextmanager
def tracking(config: Config, protocol: str, say: Callable[[str], None]) -> Iterator[Tracking]:
    """The trackers of `telemetry.trackers`, open while in it.

    Raises:
        ConfigError: a tracker's package is not installed, or it cannot be opened.
    """
    wanted = config.telemetry.trackers
    for name in wanted:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"telemetry.trackers: {name} is not installed here; `pip install 'diki-ray[{name}]'`, or leave it out."
            )
    root = Path(config.telemetry.tracking_root).expanduser()
    labels = {"run": config.run.name, "protocol": protocol, "config_digest": config.digest()}
    opened: dict[str, Tracker] = {}
    for name in wanted:
        try:
            root.mkdir(parents=True, exist_ok=True)
            opened[name] = TRACKERS[name](config, root, labels)
        except Exception as error:  # whatever a tracker raises where its place cannot be had
            raise ConfigError(
                f"telemetry.trackers: {name} cannot be opened ({type(error).__name__}: "
                f"{(str(error).splitlines() or ['no message'])[0]}); see telemetry.tracking_root={str(root)!r} and the "
                "tracker's own environment variables, or leave it out."
            ) from error
    tracked = Tracking(opened, say)
    try:
        yield tracked
    except BaseException:
        tracked.close(failed=True)
        raise
    tracked.close(failed=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections by dotted name; a list is one leaf."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves
