"""`diki-ray serve`: a run's answers over HTTP until the process is told to end."""

from __future__ import annotations

import threading
from typing import Any

from diki_ray.commands.output import print_text
from diki_ray.runs.stopping import stoppable
from diki_ray.serving.server import serving
from diki_ray.serving.settings import Settings, parse_settings, token_digest


@stoppable
def main(arguments: dict[str, Any]) -> int:
    """Serve the run until SIGTERM or Ctrl-C; the exit code. arguments: those of `serving` and fields of `Settings`."""
    token = token_digest(arguments.pop("token_file"), arguments.pop("no_token"))
    fields = {name: arguments.pop(name) for name in Settings.model_fields if name in arguments}
    settings = parse_settings(token_sha256=token, **fields)
    with serving(settings, **arguments) as url:
        print_text(f"serving run {settings.run!r} at {url}")
        threading.Event().wait()
    return 0
