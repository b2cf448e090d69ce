"""`diki-ray init` and `diki-ray doctor`: what can be typed before there is a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diki_ray.commands.options import Json, Storage, need
from diki_ray.commands.places import DEFAULT_PREPARED, configured, storage_of

setup_app = typer.Typer(rich_markup_mode=None)


@setup_app.command()
def init(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="Each a data set, or full of them.")],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The file to write; an existing one is never overwritten. Default: RUN.yaml here."
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(help="The run's name. Default: after the folders.")] = None,
    storage: Annotated[str | None, typer.Option(help="Written down as run.storage. Default: left out.")] = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Default: ViT-B-16 where it is here.")] = None,
    pretrained: Annotated[str | None, typer.Option(metavar="TAG", help="With --backbone: of its weights.")] = None,
    directory: Annotated[str | None, typer.Option(metavar="FOLDER", help="With --backbone.")] = None,
) -> None:
    """Look at folders of images and write a configuration that learns them.

    A data set is a folder with one folder of images for each class, with or without train, val and test above them,
    or any other layout that `prepare` reads. The file has comments: what was found, what was chosen and why, and about
    how long it takes.
    """
    need(backbone is not None or (pretrained is None and directory is None), "--pretrained goes with --backbone")
    missing = next((f for f in folders if ":" not in f and not Path(f).expanduser().exists()), None)
    need(missing is None, f"there is no folder {missing}")
    need(output is None or not Path(output).expanduser().exists(), f"{output} is there already: give another --output")
    from diki_ray.commands import init as command
    from diki_ray.config import BackboneSection

    chosen = None
    if backbone is not None:
        chosen = BackboneSection(name=backbone, pretrained=pretrained, directory=directory)
    raise typer.Exit(command.main(folders, output, run, storage, chosen))


@setup_app.command()
def doctor(
    storage: Storage = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Check also what this configuration names.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster. Default: RAY_ADDRESS, else none.")
    ] = None,
    json: Json = False,
) -> None:
    """Say whether this machine, the storage and the cluster are fit for a run.

    Each line is ok, warning or failed, with what to do. Nothing is started, and what is written to the storage is
    deleted again. Exit code 1: something has failed.
    """
    loaded = configured(config, (), storage, None) if config else None
    from diki_ray.commands import doctor as command
    from diki_ray.runs.doctor import Subject

    place = storage_of(storage) if loaded is None else loaded.run.storage
    raise typer.Exit(command.main(Subject.of(loaded, place, DEFAULT_PREPARED, address), json))
