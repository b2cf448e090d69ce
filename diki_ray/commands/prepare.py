"""Turn data sets into shards: python jobs/prepare.py SOURCE [SOURCE ...] --root prepared

A SOURCE is a folder in any known layout, a .csv or .jsonl manifest, or embedded:TASK. Or all sets of a benchmark:

    python jobs/prepare.py --protocol mtil-1 --data /data/coop --root s3://bucket/prepared

Shards are written as Ray tasks on the cluster in RAY_ADDRESS, or on this machine; sources and root must then be where
every node sees them. Running the same command again writes only what is missing. Exit code 2: some could not be done.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import ray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from diki_ray.config.protocols import protocol
from diki_ray.data import prepare
from diki_ray.data.sources import benchmark_folders
from diki_ray.errors import UserError
from diki_ray.runs.cluster import connected

TASKS_UNDER_WAY_PER_CPU = 2  # one that writes and one that is ready; more would only hold memory


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--root", default="prepared", help="where data sets go: a folder or s3://, gs://, az://")
    parser.add_argument("--protocol", help="prepare the data sets of this benchmark, with its shots and template")
    parser.add_argument("--data", default=".", help="with --protocol: the folder that holds the data sets' folders")
    parser.add_argument("--split", choices=("coop", "zscl"), help="split protocol (default: the benchmark's own)")
    parser.add_argument("--shots", type=int, help="training images a class (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of shots, held-out images and order")
    parser.add_argument("--template", help="replaces the data set's own, as in 'a photo of a {}.'")
    parser.add_argument("--name", help="replaces the data set's own; one SOURCE only")
    parser.add_argument("--class-names", nargs="+", default=(), help="for sources that number their classes")
    parser.add_argument("--resize", type=int, metavar="PX", help="store images at the size the backbone uses")
    parser.add_argument("--format", choices=("png", "jpeg"), default="png", help="with --resize")
    parser.add_argument("--max-skipped", type=int, help="images that may be unusable (default: 1 %%, at least 8)")
    parser.add_argument("--num-cpus", type=int, help="of a cluster started here (default: all of the machine)")
    parsed = parser.parse_args(arguments)
    if bool(parsed.sources) == bool(parsed.protocol):
        parser.error("give either SOURCEs or --protocol")
    if parsed.name and len(parsed.sources) != 1:
        parser.error("--name goes with one SOURCE")
    return parsed


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
            class_names=arguments.class_names,
            settings=settings,
        )
        found = prepare.find_finished(preparation)
        if found is None:
            yield preparation
        else:
            console.print("\n".join(["already prepared:", *prepare.summary(found)]), highlight=False)


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


def main(arguments: Sequence[str] | None = None) -> int:
    parsed, console = parse_arguments(arguments), Console(width=None if sys.stdout.isatty() else 160)
    try:
        wanted = list(plans(parsed, console))
        progress = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console)
        with connected(num_cpus=parsed.num_cpus) if wanted else nullcontext(), progress:
            for preparation in wanted:
                begun = time.monotonic()
                index = prepare.finish(preparation, write(preparation, progress), parsed.max_skipped)
                console.print("\n".join(prepare.summary(index)), highlight=False, markup=False, soft_wrap=True)
                console.print(f"  written in {time.monotonic() - begun:.1f} s", highlight=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
