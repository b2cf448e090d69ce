"""`diki-ray init`: look at folders of images and write a commented configuration that learns them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import torch

from diki_ray.clip.weights import weights_file
from diki_ray.commands.output import about, plain, size
from diki_ray.config import BackboneSection, parse
from diki_ray.config.yaml_text import read_tree
from diki_ray.data.proposal import Proposal, data_sets_in, proposed
from diki_ray.errors import ConfigError, DataError
from diki_ray.report.next_steps import typed
from diki_ray.runs.forecast import Forecast, forecast
from diki_ray.runs.plan import load_backbone
from diki_ray.runs.stopping import stoppable

REAL = BackboneSection(name="ViT-B-16", pretrained="openai")
"""What photographs are proposed to be learnt on where its weights are."""
MAX_WORKERS = 4
NAMES_SHOWN = 8
COMMENT_WIDTH = 110
_RECIPES = {
    "embedded": "optimizer: adamw, lr: 0.05, epochs: 7, batch_size: 32",
    "other": "epochs: 10",  # the published one: SGD, lr 5, batches of 128
}


@stoppable
def main(
    folders: Sequence[str], output: str | None, run: str | None, storage: str | None, backbone: BackboneSection | None
) -> int:
    """Write the configuration and say what is in it; the exit code."""
    tasks = _distinct([proposed(each) for folder in folders for each in data_sets_in(folder)])
    run = run or _run_name(tasks)
    path = Path(output or f"{run}.yaml").expanduser()
    _refuse_existing(path)
    chosen, why = _backbone(backbone)
    text = configuration(tasks, run, storage, chosen, why)
    config = parse(read_tree(text.encode(), str(path)), source=str(path))
    told = "" if weights_file(chosen) is None else _forecast_text(forecast(config, load_backbone(config)))
    command = f"{typed()} continual --config {shlex.quote(str(path))}"
    _write_new(path, _head(folders, command, told) + text)
    for task in tasks:
        print(plain(f"{task.name}: {', '.join(_about(task))}"))
        for note in task.notes:
            print(plain(f"  {note}"))
    print(f"backbone: {chosen.name}, {why}")
    print(told or "time: known once the weights are on this machine; the command with --plan says it then")
    print(f"wrote {path}. Read it, then type:\n  {command} --plan\n  {command}")
    return 0


def configuration(tasks: Sequence[Proposal], run: str, storage: str | None, backbone: BackboneSection, why: str) -> str:
    """The YAML text, without its head."""
    workers = torch.cuda.device_count() or min(MAX_WORKERS, os.cpu_count() or 1)
    recipe = _RECIPES["embedded" if backbone.name == "embedded" else "other"]
    where = {"name": run} | ({"storage": storage} if storage else {})
    lines = [
        f"run: {_flow(where)}  # the same name on the same storage is the same run: it goes on",
        "tasks:  # learnt one after the other; a task that is added later is learnt alone",
    ]
    for task in tasks:
        lines += _task(task)
    lines += [
        *_comment(f"{why[0].upper()}{why[1:]}."),
        f"backbone: {_flow(backbone.model_dump(exclude_none=True, exclude={'precision'}))}",
        *_method(backbone, recipe, workers),
        f"evaluate: {{num_workers: {workers}}}",
    ]
    return "\n".join(lines) + "\n"


def _method(backbone: BackboneSection, recipe: str, workers: int) -> list[str]:
    """Prompts are trained where that takes minutes: on the embedded CLIP, or on a GPU."""
    prompts = ["method: {name: diki}", f"train: {{{recipe}, num_workers: {workers}}}"]
    one_pass = ["method: {name: classes}", f"train: {{num_workers: {workers}}}"]
    if backbone.name == "embedded" or torch.cuda.is_available():
        return [
            *_comment(
                "Prompts are trained for each task, and the class model of all tasks routes and answers beside them."
            ),
            *prompts,
            *_comment("The class model alone takes one pass, and on photographs it does as well (docs/methods.md):"),
            *(f"# {line}" for line in one_pass),
        ]
    return [
        *_comment("Each task is learnt in one pass over its images: nothing is trained, and no class is forgotten."),
        *one_pass,
        *_comment(
            "To train prompts for each task as well, which takes many passes and wants a GPU, put these in their place:"
        ),
        *(f"# {line}" for line in prompts),
    ]


def _task(task: Proposal) -> list[str]:
    phrases = [*_about(task), *(f"Note: {note}" for note in task.notes)]
    lines = [line for phrase in phrases for line in _comment(phrase, "  ")]
    lines += [f"  - data: {_value(task.data)}", f"    name: {_value(task.name)}"]
    if task.template is None:
        return [*lines, "    # template: the data set's own ones"]
    return [*lines, f"    template: {_value(task.template)}  # the caption of a class; {{}} is its name"]


def _about(task: Proposal) -> list[str]:
    names = ", ".join(task.class_names[:NAMES_SHOWN]) + (" …" if len(task.class_names) > NAMES_SHOWN else "")
    images = ", ".join(f"{number:,} {split}" for split, number in task.num_images.items())
    return [f"{len(task.class_names)} classes ({names})", f"images: {images} ({task.layout})"]


def _comment(text: str, indent: str = "") -> list[str]:
    return wrap(plain(text), COMMENT_WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _head(folders: Sequence[str], command: str, told: str) -> str:
    lines = [
        f"Written by diki-ray init {shlex.join(folders)}. Every value may be changed; the fields that there are:",
        "docs/configuration.md.",
        "",
        f"  {command} --plan   # says what would be done, and does nothing",
        f"  {command}          # learns, evaluates and writes a report",
        *(["", *told.splitlines()] if told else []),
    ]
    return "".join(f"# {plain(line)}".rstrip() + "\n" for line in lines)


def _forecast_text(found: Forecast) -> str:
    """Says how much time and how many bytes the proposed run takes."""
    data = size(sum(task.num_bytes for task in found.tasks if task.state == "to prepare and learn"))
    time = "not known" if found.seconds is None else f"about {about(found.seconds)}"
    return f"time on this machine: {time}; prepared data: {data}; modules: {size(found.module_bytes)}"


def _backbone(given: BackboneSection | None) -> tuple[BackboneSection, str]:
    """The backbone, and why it is that one."""
    if given is not None:
        fetched = "" if weights_file(given) else "; its weights are fetched when the run starts"
        return given, f"the backbone that was asked for{fetched}"
    if weights_file(REAL) is not None:
        return REAL, "its weights are on this machine"
    return BackboneSection(), (
        "a CLIP of 2 million parameters that knows little of photographs, because the weights of "
        f"{REAL.name} are not on this machine; --backbone {REAL.name} --pretrained {REAL.pretrained} fetches them"
    )


def _distinct(tasks: Sequence[Proposal]) -> Sequence[Proposal]:
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        places = ", ".join(task.data for task in tasks if task.name == twice)
        raise DataError(f"{places} would all be the task {twice!r}: rename a folder, or write them down by hand")
    return tasks


def _run_name(tasks: Sequence[Proposal]) -> str:
    return "-".join(task.name for task in tasks[:3])[:48] + (f"-and-{len(tasks) - 3}" if len(tasks) > 3 else "")


def _flow(values: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {_value(value)}" for name, value in values.items()) + "}"


def _value(text: str) -> str:
    """A YAML scalar: plain where that is safe, else in JSON's quotes, which are YAML's too."""
    if text.isidentifier() and text.lower() not in _OTHERWISE:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


_OTHERWISE = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already and is not overwritten: give another --output.")


def _write_new(path: Path, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _refuse_existing(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another --output.") from error
