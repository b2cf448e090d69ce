"""`diki-ray prepare`: data sets become shards, written as Ray tasks."""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext

import ray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from diki_ray.commands.output import console
from diki_ray.config.protocols import protocol
from diki_ray.data import prepare
from diki_ray.data.sources import benchmark_folders
from diki_ray.runs.cluster import connected
from diki_ray.runs.stopping import stoppable

TASKS_UNDER_WAY_PER_CPU = 2  # one that writes and one that is ready; more would only hold memory


def plans(arguments: argparse.Namespace, console: Console) -> Iterator[prepare.Preparation]:
    """The data sets still to be written; says what is there already."""
    sources, split, shots, template = arguments.sources, arguments.split, arguments.shots, arguments.template
    if arguments.protocol:
        benchmark = protocol(arguments.protocol)
        split, shots, template = split or benchmark.own_split, shots or benchmark.shots, template or benchmark.template
        sources = benchmark_folders(benchmark.order, arguments.data, split)
    settings = prepare.Settings(shots, arguments.seed, arguments.resize, arguments.format)
    for source in sources:
        preparation = prepare.plan(
            source,
            arguments.root,
            name=arguments.name,
            template=template,
            split_protocol=split,
            class_names=arguments.class_names or (),
            settings=settings,
        )
        found = prepare.find_finished(preparation)
        if found is None:
            yield preparation
        else:
            console.print("\n".join(["already prepared:", *prepare.summary(found)]), highlight=False, markup=False)


def write(preparation: prepare.Preparation, progress: Progress) -> list[prepare.ShardResult]:
    """All shards of a data set, as Ray tasks."""
    task = ray.remote(max_retries=3)(prepare.write_job)
    bar = progress.add_task(preparation.raw.name, total=len(preparation.jobs))
    limit = max(1, int(TASKS_UNDER_WAY_PER_CPU * ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(preparation.jobs))
    under_way: list[ray.ObjectRef] = []
    results: list[prepare.ShardResult] = []
    while waiting or under_way:
        while waiting and len(under_way) < limit:
            under_way.append(task.remote(waiting.pop()))
        done, under_way = ray.wait(under_way)
        results += ray.get(done)
        progress.advance(bar, len(done))
    return results


@stoppable
def main(arguments: argparse.Namespace) -> int:
    """Write the shards that are missing and say what there is; the exit code."""
    shown = console()
    wanted = list(plans(arguments, shown))
    name, (_, *columns) = TextColumn("{task.description}", markup=False), Progress.get_default_columns()
    progress = Progress(name, *columns, MofNCompleteColumn(), console=shown)
    with connected(num_cpus=arguments.num_cpus) if wanted else nullcontext(), progress:
        for preparation in wanted:
            begun = time.monotonic()
            index = prepare.finish(preparation, write(preparation, progress), arguments.max_skipped)
            shown.print("\n".join(prepare.summary(index)), highlight=False, markup=False, soft_wrap=True)
            shown.print(f"  written in {time.monotonic() - begun:.1f} s", highlight=False)
    return 0
