"""`diki-ray doctor`: whether this machine, the storage and the cluster are fit for a run."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.text import Text

from diki_ray.commands.output import console, plain
from diki_ray.runs.doctor import Subject, examine
from diki_ray.runs.stopping import stoppable

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@stoppable
def main(subject: Subject, as_json: bool) -> int:
    """Print each check as it is done; exit code 1 where one has failed."""
    checks = []
    for check in examine(subject):
        checks.append(check)
        if not as_json:
            line = Text(f"{check.status:8}", style=_STYLES[check.status])
            console(soft_wrap=True).print(line.append(f"{check.name}: {plain(check.told)}", style="default"))
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    return int(any(check.status == "failed" for check in checks))
