"""Take a checkpoint that the DIKI authors released into a storage, as a run that predicts and evaluates like any other:

    python jobs/import_checkpoint.py task_11.pt runs diki-released --protocol mtil-1/coop --sources /data/mtil
    python jobs/import_checkpoint.py task_11.pt runs diki-released --config configs/mtil_1.yaml [section.field=value …]
    python jobs/import_checkpoint.py task_2.pt runs two --classes classes.json --backbone ViT-B-16 --pretrained openai

The file does not say which data sets and classes it was trained on, nor in which order: a protocol or a configuration
does (their data sets are prepared on first use), or a JSON list of {"name", "class_names", "templates"}.
"""

import argparse
import sys

from diki_ray import config as configs
from diki_ray.clip.trust import backbone_options, needs_word
from diki_ray.config import Config
from diki_ray.config.protocols import protocol
from diki_ray.errors import UserError
from diki_ray.runs.import_checkpoint import NamedTask, import_checkpoint, read_checkpoint, read_tasks
from diki_ray.runs.plan import load_backbone, make_plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="FILE", help="task_N.pt, local or s3://, gs://, az://, https://")
    parser.add_argument("storage", metavar="STORAGE")
    parser.add_argument("run", metavar="RUN", help="the name it gets")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--protocol", metavar="NAME/SPLIT", help="as in mtil-1/coop; with --sources")
    which.add_argument("--config", metavar="FILE", help="whose tasks, in their order, it was trained on")
    which.add_argument("--classes", metavar="FILE", help="a JSON list of tasks; needs no data")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for --config")
    parser.add_argument("--sources", metavar="DIR", help="with --protocol: the folder that holds its data sets")
    parser.add_argument("--backbone", default="ViT-B-16", help="it was learnt on (default: %(default)s)")
    parser.add_argument("--pretrained", default="openai", help="tag or file of its weights (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    if (arguments.protocol is None) != (arguments.sources is None):
        parser.error("--protocol and --sources go together")
    if arguments.overrides and arguments.config is None:
        parser.error("section.field=value is for --config")
    try:
        checkpoint = read_checkpoint(arguments.checkpoint)
        config, tasks = named(arguments)
        entries = import_checkpoint(checkpoint, tasks, config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where = f"{arguments.storage} {arguments.run}"
    if needs_word(config.backbone):
        where += f" {backbone_options(config.backbone)}"
    print(f"run {arguments.run!r}: {len(entries)} tasks imported ({', '.join(e.task for e in entries)}).")
    print(f"Published figures are voted by batch: python jobs/evaluate.py {where} --routing batch")
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
        config = configs.load(arguments.config, overrides)
    else:
        space = protocol(arguments.protocol.partition("/")[0]).label_space
        tree = {"run": run, "backbone": backbone, "protocol": arguments.protocol, "evaluate": {"label_space": space}}
        config = configs.parse(tree | {"data": {"sources": arguments.sources}})
    plan = make_plan(config, load_backbone(config))
    return config, tuple(NamedTask(t.name, t.class_names, t.templates) for t in plan.tasks)
