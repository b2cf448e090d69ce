"""What to type after a run: the exact commands to run it again, add a task, predict, and look at the report."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from diki_ray.clip.trust import backbone_options, needs_word
from diki_ray.config import Config
from diki_ray.report.run import REPORT

NEW_TASK = """\
- data: path/to/my_images   # a folder with one folder of images for each class
  name: my_task
  template: "a photo of a {}.\""""
"""The lines of configuration that add a task."""
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # of the pod that this process is in


def typed() -> str:
    """What stands before a command that is to be typed: `diki-ray` where the shell finds this environment's, else this
    Python."""
    return "diki-ray" if _is_found("diki-ray") else f"{shlex.quote(sys.executable)} -m diki_ray"


def typed_again(argv: Sequence[str]) -> str:
    """The command line that started this process, as it can be typed where it was typed. argv: that of Python."""
    if Path(argv[0]).name in ("diki-ray", "__main__.py"):
        command = f"{typed()} {shlex.join(argv[1:])}"
    else:
        command = shlex.join(["python" if _is_found("python") else sys.executable, *argv])
    return command.encode(errors="backslashreplace").decode()  # an argument may be no UTF-8, which documents are


def _is_found(program: str) -> bool:
    """Whether the shell finds the program, and this environment's."""
    found = shutil.which(program)
    return found is not None and Path(found).parent == Path(sys.executable).parent


def next_steps(config: Config, command: str, config_file: str | None) -> str:
    """Lines for people. command: the one that started this run; config_file: where its tasks are listed."""
    run = f"--storage {shlex.quote(config.run.storage)} --run {shlex.quote(config.run.name)}"
    word = f" {backbone_options(config.backbone)}" if needs_word(config.backbone) else ""
    return "\n".join(
        [
            "run again (trains nothing that is committed):",
            f"  {command}",
            *_add_a_task(config, config_file),
            "predict:",
            f"  {typed()} predict IMAGE {run}{word}",
            *_open_report(config),
        ]
    )


def _add_a_task(config: Config, config_file: str | None) -> list[str]:
    if not config.tasks:  # a protocol's stream is what it is
        return []
    where = config_file or "its configuration file"
    return [
        f"add a task: these lines at the end of `tasks:` in {where}, then the same command; it trains that task alone:",
        *(f"  {line}" for line in NEW_TASK.splitlines()),
    ]


def _open_report(config: Config) -> list[str]:
    """Returns what brings the report before a person, who may read this in the log of a machine without a screen."""
    storage, name = shlex.quote(config.run.storage), shlex.quote(config.run.name)
    copy = f"  {typed()} report {name} --storage {storage} --output {REPORT}"
    if urlsplit(config.run.storage).scheme:  # a browser cannot read object storage: make a local copy
        return ["copy the report, from any machine that reaches the storage:", copy]
    path = Path(config.run.storage, "runs", config.run.name, "results", REPORT).expanduser().resolve()
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        namespace = f"{_NAMESPACE.read_text().strip()}/" if _NAMESPACE.is_file() else ""
        pod = f"{namespace}{socket.gethostname()}:{path}"
        return [
            "copy the report, as long as this pod is there:",
            f"  kubectl cp -c ray-head {shlex.quote(pod)} {REPORT}",
        ]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # in the driver of a submitted job
        return ["copy the report, on any machine that has this storage at that path:", copy]
    return ["open the report:", f"  {shlex.quote(sys.executable)} -m webbrowser {shlex.quote(path.as_uri())}"]
