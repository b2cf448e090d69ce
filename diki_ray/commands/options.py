"""Options that several commands have: the same names for the same things everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Storage = Annotated[
    str | None, typer.Option(help="A local folder, s3://, gs:// or az://. Default: DIKI_STORAGE, else `storage`.")
]
Run = Annotated[str | None, typer.Option(help="The run's name. Default: DIKI_RUN.")]
Configured = Annotated[
    str | None, typer.Option(metavar="FILE", help="Default: the configuration stored with the run's results.")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Use this backbone, not the stored one. A Python file or local-dir:FOLDER is taken only from this option.",
    ),
]
Pretrained = Annotated[
    str | None, typer.Option(metavar="TAG", help="With --backbone: open_clip's tag or a file of its weights.")
]
Directory = Annotated[str | None, typer.Option(metavar="FOLDER", help="With --backbone: as backbone.directory.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.field=value]...", help="As in train.epochs=3.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def need(holds: bool, otherwise: str) -> None:
    """Raises typer.BadParameter with the sentence where something does not hold of what was typed."""
    if not holds:
        raise typer.BadParameter(otherwise)
