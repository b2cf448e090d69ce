"""`diki-ray serve` and `diki-ray serve-front`: what can be typed of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from diki_ray.commands.options import Backbone, Directory, Pretrained, Run, Storage
from diki_ray.commands.places import one_run, server_limits

serve_app = typer.Typer(rich_markup_mode=None)

_WITH_LIMITS = {"ignore_unknown_options": True, "allow_extra_args": True}
Host = Annotated[str, typer.Option(help="0.0.0.0 for everybody; default: this machine alone.")]
TokenFile = Annotated[str | None, typer.Option(metavar="FILE", help="Default: DIKI_SERVE_TOKEN has it.")]
NoToken = Annotated[bool, typer.Option("--no-token", help="Answer whoever can reach the port.")]


@serve_app.command(context_settings=_WITH_LIMITS)
def serve(
    context: typer.Context,
    storage: Storage = None,
    run: Run = None,
    host: Host = "127.0.0.1",
    port: int = 8000,
    token_file: TokenFile = None,
    no_token: NoToken = False,
    replicas: int = 1,
    cpus_per_replica: float = 1.0,
    gpus_per_replica: float = 0.0,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster. Default: RAY_ADDRESS, else a cluster is started here.")
    ] = None,
    backbone: Backbone = None,
    pretrained: Pretrained = None,
    directory: Directory = None,
) -> None:
    """Answer images over HTTP with what a run has learnt.

    Reads the run's storage and takes no lease; tasks that are learnt later are served within seconds. The page is at
    the URL itself, the OpenAPI document at /openapi.json. Limits are options too, written `--max-images 8`: "A server"
    in docs/configuration.md lists them.
    """
    given = {name: value for name, value in locals().items() if name != "context"}
    given["storage"], given["run"], _ = one_run(storage, run, None)
    limits = server_limits(context.args, of_front=False)
    from diki_ray.commands import serve as command

    raise typer.Exit(command.main(given | limits))


@serve_app.command("serve-front", context_settings=_WITH_LIMITS)
def serve_front(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: int = 8000,
    upstream: Annotated[str, typer.Option(metavar="URL", help="Ray Serve's proxy.")] = "http://127.0.0.1:8001",
    token_file: TokenFile = None,
    no_token: NoToken = False,
) -> None:
    """Guard a RayService's pod as `serve` guards itself.

    It limits connections, request heads and bodies, and asks for the token. It answers /healthz for Ray Serve's proxy
    beside it and passes the other requests on to the proxy. It needs no Ray and ends at SIGTERM. Its limits are options
    too, as for `serve`.
    """
    limits = server_limits(context.args, of_front=True)
    from diki_ray.commands import serve_front as command

    raise typer.Exit(command.main(host, port, upstream, token_file, no_token, limits))
