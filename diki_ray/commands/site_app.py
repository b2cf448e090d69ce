"""`diki-ray site COMMAND`: what can be typed where several sites learn a task together and share no image."""

from __future__ import annotations

from argparse import Namespace
from typing import Annotated

import typer

from diki_ray.commands.options import Json, Overrides, Run, Storage, need
from diki_ray.commands.places import configured

site_app = typer.Typer(
    help="Learn a task from images that stay at several sites: each makes a part from its own, and the parts are "
    "merged (docs/sites.md).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DEFAULT_MIN_COUNT = 10
"""A threshold that offices of statistics use for cells of a table; no proof of privacy (docs/sites.md)."""
Agreed = Annotated[str, typer.Option(metavar="FILE", help="The configuration that all sites have agreed on.")]
MinCount = Annotated[int, typer.Option(min=1, metavar="N", help="A class in a part has at least N images, or none.")]


@site_app.command()
def part(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Written; local, s3://, gs:// or az://.")],
    config: Agreed,
    overrides: Overrides = None,
    task: Annotated[
        str | None, typer.Option(help="The configuration's task to make a part of. Default: the only one.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FOLDER", help="This site's images, in any known layout.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="All classes that the sites agreed on. Default: those of the data."),
    ] = None,
    min_count: MinCount = DEFAULT_MIN_COUNT,
    small_classes: Annotated[
        str,
        typer.Option(metavar="[refuse|leave-out]", help="What to do with classes of fewer than --min-count images."),
    ] = "refuse",
    json: Json = False,
) -> None:
    """Make this site's part of a task from its training images.

    The part holds sums of features, counts and names, and no image. What it may reveal, and what no site should do, is
    in docs/sites.md.
    """
    need(small_classes in ("refuse", "leave-out"), "--small-classes is refuse or leave-out")
    given = Namespace(**locals())
    given.config = configured(config, overrides or (), None, None)
    from diki_ray.commands import site as command

    raise typer.Exit(command.part(given))


@site_app.command()
def merge(
    parts: Annotated[list[str], typer.Argument(metavar="PART...", help="Files that the sites made.")],
    config: Agreed,
    storage: Storage = None,
    run: Run = None,
    min_count: MinCount = DEFAULT_MIN_COUNT,
    json: Json = False,
) -> None:
    """Merge the parts of a task into its module, and commit it to a run.

    The order of the parts does not matter, and merging the same parts again changes nothing. When a part comes later,
    give it together with all earlier ones.
    """
    given = Namespace(**locals())
    given.config = configured(config, (), storage, run)
    from diki_ray.commands import site as command

    raise typer.Exit(command.merge(given))
