"""`diki-ray import`: a checkpoint that the DIKI authors released, as a run like any other."""

import argparse
import shlex

from diki_ray import config as configs
from diki_ray.clip.trust import backbone_options, needs_word
from diki_ray.commands.output import print_text
from diki_ray.commands.places import config_file
from diki_ray.config import Config
from diki_ray.config.protocols import protocol
from diki_ray.report.next_steps import typed
from diki_ray.runs.import_checkpoint import NamedTask, import_checkpoint, read_checkpoint, read_tasks
from diki_ray.runs.plan import plan_of


def main(arguments: argparse.Namespace) -> int:
    """Read the checkpoint, name its tasks, commit their modules and say what to type next; the exit code."""
    checkpoint = read_checkpoint(arguments.checkpoint)
    config, tasks = named(arguments)
    entries = import_checkpoint(checkpoint, tasks, config)
    where = f"--storage {shlex.quote(arguments.storage)} --run {shlex.quote(arguments.run)}"
    if needs_word(config.backbone):
        where += f" {backbone_options(config.backbone)}"
    print_text(f"run {arguments.run!r}: {len(entries)} tasks imported ({', '.join(e.task for e in entries)}).")
    print_text(f"Published figures are voted by batch: {typed()} evaluate {where} --routing batch")
    return 0


def named(arguments: argparse.Namespace) -> tuple[Config, tuple[NamedTask, ...]]:
    run = {"name": arguments.run, "storage": arguments.storage}
    backbone = {"name": arguments.backbone, "pretrained": arguments.pretrained}
    if arguments.classes is not None:
        tasks = read_tasks(arguments.classes)
        listed = [{"data": t.name, "name": t.name} for t in tasks]
        return configs.parse({"run": run, "backbone": backbone, "tasks": listed}), tasks
    if arguments.config is not None:
        overrides = [*arguments.overrides, *(f"run.{name}={value}" for name, value in run.items())]
        config = configs.load(config_file(arguments.config), overrides)
    else:
        space = protocol(arguments.protocol.partition("/")[0]).label_space
        tree = {"run": run, "backbone": backbone, "protocol": arguments.protocol, "evaluate": {"label_space": space}}
        config = configs.parse(tree | {"data": {"sources": arguments.sources}})
    plan = plan_of(config)
    return config, tuple(NamedTask(t.name, t.class_names, t.templates) for t in plan.tasks)
