"""What can be typed, `diki-ray COMMAND`: every command's arguments, checked before anything heavy is imported.

Each function here states one command's arguments and hands them on to the file of its name beside this one, whose
imports (torch, Ray) take seconds. `run` is also what each file of jobs/ calls.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version as installed
from typing import Annotated

import typer

from diki_ray.commands import old_spellings
from diki_ray.commands.options import (
    Backbone,
    Configured,
    Directory,
    Json,
    Overrides,
    Pretrained,
    Run,
    Storage,
    need,
)
from diki_ray.commands.output import finish_output, prepare_output, print_error
from diki_ray.commands.places import DEFAULT_PREPARED, one_run, storage_of
from diki_ray.commands.serve_app import serve_app
from diki_ray.commands.setup_app import setup_app
from diki_ray.commands.site_app import site_app
from diki_ray.commands.store_app import store_app
from diki_ray.errors import UserError

app = typer.Typer(
    name="diki-ray",
    help="Learn a stream of tasks with a frozen CLIP on Ray, and answer images with what was learnt.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(setup_app)
app.add_typer(serve_app)
app.add_typer(store_app, name="store")
app.add_typer(site_app, name="site")


def run(command: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 2 for what the user can put right, with a sentence on stderr.

    command: what stands before the arguments, for a file of jobs/ that is one command.
    arguments: those of this process by default.
    """
    prepare_output()
    os.environ.setdefault("DIKI_LIGHT_IMPORT", "1")  # clip/light_import.py, which is not to be imported yet
    typed = list(sys.argv[1:] if arguments is None else arguments)
    typed = old_spellings.rewritten([command, *typed] if command else typed)
    code = _code_of(typed)
    if (lost := finish_output()) is not None:
        print_error(UserError(f"standard output or error could not be written ({lost}); the command itself went on."))
        return code or 2
    return code


def _code_of(typed: list[str]) -> int:
    try:
        app(typed, prog_name="diki-ray")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@app.command()
def continual(
    config: Annotated[str, typer.Option(metavar="FILE", help="A YAML file, or the name of one of ours: quickstart.")],
    overrides: Overrides = None,
    storage: Storage = None,
    run: Annotated[str | None, typer.Option(help="Instead of the configuration's run.name.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON.")] = False,
) -> None:
    """Learn a stream of tasks.

    Running the same command again continues the run: what is committed is not trained again, and a task that was
    added to the configuration is trained alone.
    """
    need(plan or not json, "--json goes with --plan")
    from diki_ray.commands.places import configured

    loaded = configured(config, overrides or (), storage, run)
    from diki_ray.commands import continual as command

    raise typer.Exit(command.plan(loaded, json) if plan else command.main(loaded, config))


@app.command()
def sweep(
    config: Annotated[str, typer.Option(metavar="FILE", help="A sweep's YAML file, or the name of one of ours.")],
    overrides: Overrides = None,
    storage: Storage = None,
) -> None:
    """Sweep a configuration with Ray Tune.

    Overrides apply to the configuration that is varied. Every module is trained once; settings that have a result are
    not run again. What is chosen is chosen on validation, and its test numbers are reported once.
    """
    from diki_ray.commands.places import configured_sweep

    loaded = configured_sweep(config, overrides or (), storage)
    from diki_ray.commands import sweep as command

    raise typer.Exit(command.main(*loaded))


@app.command()
def rehearse(
    protocol: Annotated[str, typer.Argument(metavar="PROTOCOL", help="A benchmark with its split: mtil-1/coop.")],
    overrides: Overrides = None,
    storage: Storage = None,
) -> None:
    """Rehearse a benchmark without its data, on the cluster and the storage where it is to run.

    It writes stand-ins for the benchmark's data sets to ./rehearsal, with a few images of noise for each class, in the
    layout of the split. Then it runs the benchmark's own configuration on them for one epoch with the embedded CLIP.
    This takes minutes. The accuracies mean nothing.
    """
    from diki_ray.commands.places import rehearsed

    given = [f"run.storage={storage}"] if storage else []
    loaded = rehearsed(protocol, [*given, *(overrides or ())])
    from diki_ray.commands import rehearse as command

    raise typer.Exit(command.main(loaded))


@app.command()
def prepare(
    sources: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE]...")] = None,
    root: Annotated[str, typer.Option(help="Where data sets go: a folder or s3://, gs://, az://.")] = DEFAULT_PREPARED,
    protocol: Annotated[str | None, typer.Option(help="Prepare this benchmark's data sets, with its shots.")] = None,
    data: Annotated[str, typer.Option(help="With --protocol: the folder that holds the data sets' folders.")] = ".",
    split: Annotated[str | None, typer.Option(metavar="[coop|zscl]", help="Default: the benchmark's own.")] = None,
    shots: Annotated[int | None, typer.Option(help="Training images a class. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed that draws shots, held-out images and the order.")] = 0,
    template: Annotated[
        str | None, typer.Option(help="Caption to use instead of the data set's own, as in 'a photo of a {}.'")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Instead of the data set's own; one SOURCE only.")] = None,
    class_names: Annotated[list[str] | None, typer.Option(help="For sources that number their classes.")] = None,
    resize: Annotated[int | None, typer.Option(metavar="PX", help="Store images at the backbone's size.")] = None,
    format: Annotated[str, typer.Option(metavar="[png|jpeg]", help="With --resize.")] = "png",
    max_skipped: Annotated[int | None, typer.Option(help="Default: 1 % of the images, at least 8.")] = None,
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs of a cluster that is started here. Default: all of this machine.")
    ] = None,
) -> None:
    """Turn data sets into shards.

    A SOURCE is a folder in any known layout, a .csv or .jsonl manifest, or embedded:TASK; or --protocol names the sets
    of a benchmark. Shards are written as Ray tasks on the cluster in RAY_ADDRESS, or on this machine. Running the same
    command again writes only what is missing. Exit code 2: some could not be done.
    """
    given = Namespace(**locals())
    need(bool(sources) != bool(protocol), "give either SOURCEs or --protocol")
    need(not name or len(sources or ()) == 1, "--name goes with one SOURCE")
    need(split in (None, "coop", "zscl"), "--split is coop or zscl")
    need(format in ("png", "jpeg"), "--format is png or jpeg")
    from diki_ray.commands import prepare as command

    raise typer.Exit(command.main(given))


@app.command()
def evaluate(
    storage: Storage = None,
    run: Run = None,
    config: Configured = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    directory: Directory = None,
    routing: Annotated[str | None, typer.Option(metavar="[image|batch]", help="Default: the run's.")] = None,
    label_space: Annotated[str | None, typer.Option(metavar="[task|seen|all]", help="Default: the run's.")] = None,
    order: Annotated[str | None, typer.Option(metavar="A,B,…", help="The tasks learnt, in this order.")] = None,
    split: Annotated[str, typer.Option(metavar="[test|val|train]")] = "test",
    compare: Annotated[list[str] | None, typer.Option(metavar="RUN", help="Another run of the same storage.")] = None,
    classes: Annotated[bool, typer.Option("--classes", help="Show the accuracy on each class.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute all of it, and keep nothing.")] = False,
    json: Json = False,
) -> None:
    """Evaluate what a run has learnt, under any routing, label space and order, without training.

    It runs in this process, without a cluster, and takes earlier results from the storage's cache. Beside the
    accuracies it reports each class, which task's module answers which task's images, the calibration of confidences
    (ECE), and how well the integration weight tells learnt from unlearnt domains (AUROC).
    """
    given = Namespace(**locals())
    need(routing in (None, "image", "batch"), "--routing is image or batch")
    need(label_space in (None, "task", "seen", "all"), "--label-space is task, seen or all")
    need(split in ("test", "val", "train"), "--split is test, val or train")
    given.storage, given.run, given.config = one_run(storage, run, config)
    from diki_ray.commands import evaluate as command

    given.compare = compare or []
    raise typer.Exit(command.main(given))


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, or s3://, gs://, az://, https://.")],
    storage: Storage = None,
    run: Run = None,
    config: Configured = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    directory: Directory = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B,…", help="Choose among these, learnt or not.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Caption of the named classes. Default: 'a photo of a {}.'")
    ] = None,
    json: Json = False,
    output: Annotated[str | None, typer.Option(metavar="PLACE", help="FILE.jsonl or FOLDER.parquet.")] = None,
    max_skipped: Annotated[
        int | None, typer.Option(metavar="N", help="Stop when more than N images are unusable. Default: never.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="With --output: address of a Ray cluster. Default: RAY_ADDRESS, else a cluster is started here."
        ),
    ] = None,
    num_workers: Annotated[int | None, typer.Option(help="Default: as many as there is room for.")] = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
) -> None:
    """Answer images with what a run has learnt.

    It needs the run's storage and no cluster. It chooses among all classes learnt, or with --classes among those that
    you name. With --output it answers any number of images over Ray: files, folders, globs, prepared data sets and
    WebDataset tars. The output has one row for each input, in their order. An image that cannot be used gets a row with
    an `error`.
    """
    given = Namespace(**locals())
    need(template is None or classes is not None, "--template is for --classes")
    need(output is None or not json, "--json is for answers that are shown; --output writes them")
    given.storage, given.run, given.config = one_run(storage, run, config)
    from diki_ray.commands import predict as command

    raise typer.Exit(command.main(given))


@app.command()
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Names, or paths of results.json.")
    ] = None,
    storage: Storage = None,
    run: Run = None,
    output: Annotated[str, typer.Option(metavar="FILE")] = "report.html",
) -> None:
    """Make one HTML page of one run, or of several side by side.

    The page stands alone: no network, no scripts.
    """
    wanted = runs or [one_run(storage, run, None)[1]]
    from diki_ray.commands import report as command

    raise typer.Exit(command.main(Namespace(runs=wanted, storage=storage_of(storage), output=output)))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where it goes; local, s3://, gs:// or az://.")],
    storage: Storage = None,
    run: Run = None,
    config: Configured = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    directory: Directory = None,
) -> None:
    """Export a run as a bundle to hand on.

    FOLDER gets bundle.safetensors, a model card (README.md) and config.yaml. Load it anywhere, without Ray:
    `diki_ray.load("FOLDER").predict(["photo.jpg"])` in Python.
    """
    given = Namespace(**locals())
    given.storage, given.run, given.config = one_run(storage, run, config)
    from diki_ray.commands import export as command

    raise typer.Exit(command.main(given))


@app.command("import")
def import_(
    checkpoint: Annotated[str, typer.Argument(metavar="FILE", help="task_N.pt, local or a URL.")],
    overrides: Overrides = None,
    storage: Storage = None,
    run: Annotated[str | None, typer.Option(help="The name that it gets. Default: DIKI_RUN.")] = None,
    protocol: Annotated[
        str | None, typer.Option(metavar="NAME/SPLIT", help="As in mtil-1/coop; with --sources.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Configuration whose tasks it learnt, in this order.")
    ] = None,
    classes: Annotated[str | None, typer.Option(metavar="FILE", help="A JSON list of tasks; needs no data.")] = None,
    sources: Annotated[str | None, typer.Option(metavar="DIR", help="With --protocol: its data sets' folder.")] = None,
    backbone: Annotated[str, typer.Option(help="Backbone that it was trained on.")] = "ViT-B-16",
    pretrained: Annotated[str, typer.Option(help="Tag or file of its weights.")] = "openai",
) -> None:
    """Import a checkpoint that the DIKI authors released. It becomes a run like any other in the storage.

    The file does not say on which data sets and classes it was trained, nor in which order. Give a protocol or a
    configuration (their data sets are prepared on first use), or a JSON list of {"name", "class_names", "templates"}.
    """
    given = Namespace(**locals())
    need(sum(which is not None for which in (protocol, config, classes)) == 1, "give --protocol, --config or --classes")
    need((protocol is None) == (sources is None), "--protocol and --sources go together")
    need(not overrides or config is not None, "section.field=value is for --config")
    given.storage, given.run, _ = one_run(storage, run, None)
    given.overrides = overrides or []
    from diki_ray.commands import import_checkpoint as command

    raise typer.Exit(command.main(given))


@app.command()
def version() -> None:
    """Print the versions of this package and of Ray."""
    print(f"diki-ray {installed('diki-ray')}, Ray {installed('ray')}")
