"""`diki-ray store COMMAND`: what can be typed of a run's store. What it does is in `store.py` beside this file."""

from __future__ import annotations

from argparse import Namespace
from typing import Annotated

import typer

from diki_ray.commands.options import Json, Run, Storage
from diki_ray.commands.places import one_run, storage_of

store_app = typer.Typer(
    help="Look at, check, move and trim a run's store. What changes a run needs its lease and is refused "
    "while a driver has it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TakeOver = Annotated[bool, typer.Option("--take-over", help="Take the run from the driver that has it.")]
Path = Annotated[str, typer.Argument(metavar="PATH", help="A folder, or a .tar.")]


@store_app.command("list")
def list_(
    storage: Storage = None,
    run: Annotated[str | None, typer.Option(help="A run, whose modules are listed; without: the runs.")] = None,
    history: Annotated[bool, typer.Option("--history", help="The run's log instead of its modules.")] = False,
    json: Json = False,
) -> None:
    """The runs of a storage, or the modules of a run."""
    _act("list_", Namespace(storage=storage_of(storage), run=run, history=history, json=json))


@store_app.command()
def verify(storage: Storage = None, run: Run = None, json: Json = False) -> None:
    """Check a run and list everything that is wrong with it. Exit code 1 if anything is."""
    _act("verify", _of_run(storage, run, json=json))


@store_app.command()
def export(path: Path, storage: Storage = None, run: Run = None, json: Json = False) -> None:
    """Export the run to a folder, or to a .tar, which opens as a storage."""
    _act("export", _of_run(storage, run, path=path, json=json))


@store_app.command("import")
def import_(path: Path, storage: Storage = None, run: Run = None, json: Json = False) -> None:
    """Take a run that was exported into the storage."""
    _act("import_", _of_run(storage, run, path=path, json=json))


@store_app.command()
def remove(
    task: Annotated[str, typer.Argument(metavar="TASK")],
    storage: Storage = None,
    run: Run = None,
    json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Remove a task: the run is then as if it had never learnt it."""
    _act("remove", _of_run(storage, run, task=task, json=json, take_over=take_over))


@store_app.command()
def rollback(
    seq: Annotated[int, typer.Argument(metavar="SEQ", help="The entry of the log after which the run was right.")],
    storage: Storage = None,
    run: Run = None,
    json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Return the run to its state after an entry of its log."""
    _act("rollback", _of_run(storage, run, seq=seq, json=json, take_over=take_over))


@store_app.command()
def purge(
    storage: Storage = None,
    run: Run = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Delete module files that no run of the storage refers to."""
    _act("purge", _of_run(storage, run, dry_run=dry_run, json=json, take_over=take_over))


@store_app.command()
def compact(
    storage: Storage = None,
    run: Run = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without log entries that can't be read.")
    ] = False,
    json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Make a long log quick to open."""
    _act("compact", _of_run(storage, run, accept_loss=accept_loss, json=json, take_over=take_over))


@store_app.command()
def fill(
    storage: Storage = None,
    run: Run = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Configuration that the run was learnt with, if it is not the stored one."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Instead of the stored one.")] = None,
    pretrained: Annotated[str | None, typer.Option(metavar="TAG", help="With --backbone: of its weights.")] = None,
    directory: Annotated[str | None, typer.Option(metavar="FOLDER", help="With --backbone.")] = None,
    json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Compute the class means that modules of an earlier version lack, from their images."""
    storage, run, loaded = one_run(storage, run, config)
    told = {"config": loaded, "backbone": backbone, "pretrained": pretrained, "directory": directory}
    _act("fill", Namespace(storage=storage, run=run, json=json, take_over=take_over, **told))


def _of_run(storage: str | None, run: str | None, **more: str | int | bool) -> Namespace:
    storage, run, _ = one_run(storage, run, None)
    return Namespace(storage=storage, run=run, **more)


def _act(action: str, given: Namespace) -> None:
    from diki_ray.commands import store

    raise typer.Exit(store.main(getattr(store, action), given))
