"""Ray answers millions of images: reading tasks hand undecoded images to worker actors, the driver writes their
answers as they come, in the order of the inputs.

The driver reads the run's storage; workers get its modules from Ray's object store, all of them those of one version,
and need the backbone's files and the inputs. Class features are interpolated (answering/class_features.py): to compute
them at each image's own weight would cost a text pass over all classes for every image.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import ray

from diki_ray.config import Config
from diki_ray.data.inputs import InputPart, to_json
from diki_ray.errors import ConfigError, DataError, UserError
from diki_ray.learning.methods import METHODS
from diki_ray.prediction.batch_output import open_output
from diki_ray.prediction.batch_reader import read_parts
from diki_ray.prediction.batch_worker import (
    CALLS_AT_ONCE,
    COMPUTED_S,
    IMAGES_PER_PASS,
    Learnt,
    Worker,
    interpolation_error,
)
from diki_ray.runs.cluster import keeps_memory
from diki_ray.runs.run_cluster import cluster

IMAGES_PER_BLOCK = 256
"""A reading task has about so many images: Ray takes some milliseconds of the processor for each task and its block."""
BLOCKS_PER_WORKER = 8
"""A small job has so many blocks of fewer images, so that its workers end together."""
MAX_BLOCKS = 1024
"""A whole job has no more; each passes some milliseconds in Ray's scheduler."""
PROGRESS_S = 10.0


@dataclass(frozen=True)
class Workers:
    """Says what Ray gives the workers. num is by default as many as there is room for; answers do not depend on it."""

    num: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None


@dataclass
class Tally:
    """Counts what became of the inputs so far."""

    num_images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    interpolation_error: float | None = None
    """It is that of `batch_worker.interpolation_error`; None: nothing was interpolated."""
    num_workers: int = 1
    _first: tuple[float, int] | None = None
    _last_s: float = 0.0
    _num_tables: int = 0
    _steady_s: float = 0.0
    _computed_s: float = 0.0

    @property
    def num_skipped(self) -> int:
        return self.skipped.total()

    @property
    def images_per_s(self) -> float:
        """The rate counts from the first answers on, before which workers start; it is 0 until the second come."""
        if self._first is None or self._last_s == self._first[0]:
            return 0.0
        return (self.num_images - self._first[1]) / (self._last_s - self._first[0])

    @property
    def computing_share(self) -> float:
        """The share of the time in which workers computed: in what is left they waited, most of all for images to be
        read and decoded. It counts from when every worker has given two tables of answers, for the first ones were
        computed before any came; it is 0 until then."""
        if self._computed_s == 0 or self._last_s == self._steady_s:
            return 0.0
        return min(1.0, self._computed_s / (self._last_s - self._steady_s) / self.num_workers)

    def add(self, rows: pa.Table) -> None:
        self.num_images += len(rows)
        self._last_s = time.monotonic()
        self._first = self._first or (self._last_s, self.num_images)
        self._num_tables += 1
        if self._num_tables == 2 * self.num_workers:
            self._steady_s = self._last_s
        elif self._num_tables > 2 * self.num_workers:
            self._computed_s += pc.sum(rows[COMPUTED_S.name]).as_py() or 0.0
        self.skipped.update(error for error in rows["error"].to_pylist() if error)
        self.tasks.update(task for task in rows["task"].to_pylist() if task)


def answer_all(
    learnt: Learnt,
    parts: Sequence[InputPart],
    output: str,
    workers: Workers,
    max_skipped: int | None = None,
    say: Callable[[str], None] = print,
) -> Tally:
    """Writes an answer for every input; says how far it is every PROGRESS_S, and what it came to.

    max_skipped: of images that cannot be used; None: any number.

    Raises:
        DataError: more images than `max_skipped` cannot be used; the output stays unfinished. Else as `answer_parts`.
    """
    counts = [part.num_images for part in parts]
    total = None if None in counts else sum(n for n in counts if n is not None)
    tally, started = Tally(), time.monotonic()
    shown = started
    with open_output(output) as file, closing(answer_parts(learnt, parts, workers, tally)) as answers:
        for rows in answers:
            file.write(rows)
            if max_skipped is not None and tally.num_skipped > max_skipped:
                raise DataError(f"{_skipped(tally)}; --max-skipped is {max_skipped}, so {output} was not finished.")
            if time.monotonic() - shown >= PROGRESS_S:
                shown = time.monotonic()
                say(_progress(tally, total))
    rate = f", {tally.images_per_s:,.0f} images/s from the first answers on" if tally.images_per_s else ""
    share = f", workers computed {tally.computing_share:.0%} of the time" if tally.computing_share else ""
    say(f"{tally.num_images:,} images in {time.monotonic() - started:.0f} s{rate}{share}: {output}")
    if tally.num_skipped:
        say(f"{_skipped(tally)}.")
    if tally.interpolation_error is not None:
        say(
            f"Class features are interpolated between {learnt.config.evaluate.text_grid} weights; the largest error "
            f"of one (norm 1) is {tally.interpolation_error:.1e}."
        )
    return tally


def _progress(tally: Tally, total: int | None) -> str:
    of = "" if total is None else f" of {total:,}"
    skipped = f", {tally.num_skipped:,} not usable" if tally.num_skipped else ""
    rate, left = tally.images_per_s, ""
    if total is not None and rate:
        left = f", {timedelta(seconds=round((total - tally.num_images) / rate))} left"
    return f"{tally.num_images:,}{of} images, {rate:,.0f} images/s{skipped}{left}"


def _skipped(tally: Tally) -> str:
    reasons = ", ".join(f"{count:,} × {reason}" for reason, count in tally.skipped.most_common(5))
    return f"{tally.num_skipped:,} images could not be used ({reasons})"


def answer_parts(
    learnt: Learnt, parts: Sequence[InputPart], workers: Workers, tally: Tally
) -> Generator[pa.Table, None, None]:
    """Yields answers (`ANSWERED`) for every input of the parts, in their order, and counts them in `tally`.

    On the cluster at `workers.address` or in RAY_ADDRESS, else on one started here for as long as it takes.

    Raises:
        ConfigError: the cluster cannot be joined or is too small. UserError: what a worker could not do.
    """
    with cluster(_on_cluster(learnt.config, workers)):
        num = tally.num_workers = workers.num or _room(workers)
        _quiet()
        reference = ray.put(learnt)
        rows = [{"part": to_json(part)} for part in parts]
        num_blocks = _num_blocks([part.num_images for part in parts], num)
        answered = (
            ray.data.from_items(rows, override_num_blocks=num_blocks)
            .map_batches(
                partial(read_parts, size_px=None if learnt.squares is None else learnt.squares.size_px),
                batch_size=1,
                num_cpus=0,
                concurrency=min(_readers(num, workers.cpus, learnt.config.data.num_threads), num_blocks),
            )
            .map_batches(
                Worker,
                fn_constructor_args=[reference],
                batch_size=IMAGES_PER_PASS,
                batch_format="pyarrow",
                # Without true multi-threading Ray Data makes the calls one after another, whatever their number.
                compute=ray.data.ActorPoolStrategy(
                    size=num, max_concurrent_calls_per_actor=CALLS_AT_ONCE, enable_true_multi_threading=True
                ),
                num_cpus=workers.cpus,
                num_gpus=workers.gpus,
                runtime_env=keeps_memory(),
            )
        )
        for table in _or_reason(answered.iter_batches(batch_size=None, batch_format="pyarrow")):
            tally.add(table)
            yield table.drop_columns(COMPUTED_S.name)
        routed = METHODS[learnt.config.method.name].answering == "routed"
        if not (routed and learnt.config.evaluate.text_grid and tally.tasks):
            return
        tally.interpolation_error = learnt.text_error
        if tally.interpolation_error is None:
            measure = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(interpolation_error)
            tally.interpolation_error = ray.get(measure.remote(reference, tuple(tally.tasks)))


def _on_cluster(config: Config, workers: Workers) -> Config:
    """Returns what `cluster` checks: that there is room for these workers, whatever the run was trained with."""
    nothing = {"num_workers": 1, "cpus_per_worker": 1e-3, "device": "cpu"}  # is trained
    train = config.train.model_copy(update=nothing)
    evaluate = config.evaluate.model_copy(update={"num_workers": workers.num or 1, "cpus_per_worker": workers.cpus})
    joined = config.cluster.model_copy(update={"address": workers.address or config.cluster.address})
    return config.model_copy(update={"train": train, "evaluate": evaluate, "cluster": joined})


def _room(workers: Workers) -> int:
    there = ray.cluster_resources()
    room = [there.get("CPU", 0) // workers.cpus]
    if workers.gpus:
        room.append(there.get("GPU", 0) // workers.gpus)
    if min(room) < 1:
        raise ConfigError(
            f"a worker needs {workers.cpus:g} CPUs and {workers.gpus:g} GPUs, and the cluster has "
            f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}: ask for less, or say "
            "with --num-workers how many a cluster that grows is to start."
        )
    return int(min(room))


def _num_blocks(images: Sequence[int | None], num_workers: int) -> int:
    """Returns the number of reading tasks for parts of so many images (None: a tar, which has many)."""
    wanted = sum(n or IMAGES_PER_BLOCK for n in images) // IMAGES_PER_BLOCK
    return min(len(images), MAX_BLOCKS, max(BLOCKS_PER_WORKER * num_workers, wanted))


def _readers(num: int, cpus: float, threads: int) -> int:
    """Returns how many processes read for `num` workers of so many CPUs: `threads` for each, but no more than there are
    CPUs, as each takes seconds of one to start. A cluster that has no room for the workers yet will grow."""
    wanted, there = max(2, num * threads), int(ray.cluster_resources().get("CPU", 0))
    return wanted if there < num * cpus else max(2, min(wanted, there))


def _quiet() -> None:
    """Silences Ray Data, as the driver shows its own progress, and keeps rows in the order of the inputs."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _or_reason(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields the tables; what a worker raised is raised here with its own sentence."""
    try:
        yield from tables
    except Exception as error:  # Ray Data raises its own types around the one that says why
        chain: list[BaseException] = []
        inner: BaseException | None = error
        while inner is not None:
            chain.append(inner)
            inner = getattr(inner, "cause", None) or inner.__cause__
        for found in reversed(chain):
            if isinstance(found, UserError) and not isinstance(found, ray.exceptions.RayError):
                raise found from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reasons = [line for line in lines if "Error: " in line]
        raise DataError(f"a worker could not go on: {(reasons or lines or [repr(error)])[-1]}") from error
