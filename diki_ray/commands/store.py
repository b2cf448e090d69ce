"""`diki-ray store`: a run's store looked at, checked, moved and trimmed."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from diki_ray.commands.output import console, plain, print_json
from diki_ray.errors import LeaseHeldError, UserError
from diki_ray.report.next_steps import typed
from diki_ray.store.log import Entry, holder_of
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

Report = dict[str, Any]  # what --json prints; people see its lists as tables, then its `text`


def list_(args: argparse.Namespace) -> Report:
    if args.run is None:
        runs = [_run_line(RunStore.open(args.storage, run)) for run in RunStore.runs(args.storage)]
        return {"runs": runs, "text": f"{len(runs)} run(s) in {args.storage}"}
    store = _existing(args)
    entries = store.log.entries(1, store.version) if args.history else store.modules()
    lines = [_entry_line(entry) for entry in entries]
    return {"history" if args.history else "modules": lines, "text": f"{len(lines)} of {store.version} log entries"}


def verify(args: argparse.Namespace) -> Report:
    store = _existing(args, salvage=True)
    from diki_ray.runs.verification import problems_of  # torch, which the other commands of a store do not need

    problems = [vars(problem) for problem in problems_of(store)]
    text = f"{len(store.modules())} module(s) read, {len(problems)} problem(s) found"
    return {"problems": problems, "text": text, "exit_code": 1 if problems else 0}


def export(args: argparse.Namespace) -> Report:
    num_bytes = _existing(args).export(args.path)
    return {
        "path": args.path,
        "num_bytes": num_bytes,
        "text": f"{num_bytes:,} bytes in {args.path}: it opens as a storage",
    }


def import_(args: argparse.Namespace) -> Report:
    store = RunStore.import_(args.storage, args.run, args.path)
    text = (
        f"run {args.run!r} has {len(store.modules())} modules in {args.storage}\n"
        "Its report.html is not taken, as a page from elsewhere may hold scripts; to make it again:\n"
        f"  {typed()} report {_named(args)}"
    )
    return {"num_modules": len(store.modules()), "text": text}


def remove(args: argparse.Namespace) -> Report:
    with _held(args) as (store, epoch):
        before = store.version
        entry = store.remove_task(epoch, args.task)
    text = (
        f"Task {args.task!r} is out of run {args.run!r}, which now is exactly what it would be without it.\n"
        "Its module stays in the library, for other runs and to undo this:\n"
        f"  {typed()} store rollback {_named(args)} {before}\n"
        "To delete its bytes for good, unless another run of this storage refers to them:\n"
        f"  {typed()} store purge {_named(args)}\n"
        "The log keeps the task's name and metadata, and results/ what it says until the run is evaluated again."
    )
    return {"removed": _entry_line(entry), "undo_with": before, "text": text}


def rollback(args: argparse.Namespace) -> Report:
    with _held(args) as (store, epoch):
        before = store.version
        modules = store.roll_back(epoch, args.seq)
    text = (
        f"Run {args.run!r} is as it was after entry {args.seq}. To undo:\n"
        f"  {typed()} store rollback {_named(args)} {before}"
    )
    return {"modules": [_entry_line(entry) for entry in modules], "undo_with": before, "text": text}


def purge(args: argparse.Namespace) -> Report:
    with _held(args) as (store, epoch):
        report = store.purge(epoch, args.dry_run)
    done = "would be deleted" if report.dry_run else "deleted"
    text = f"{len(report.digests)} modules, {report.num_bytes:,} bytes {done} (no run of the storage refers to them)"
    return {**vars(report), "text": text}


def compact(args: argparse.Namespace) -> Report:
    with _held(args, salvage=args.accept_loss) as (store, epoch):
        seq, damaged = store.compact(epoch), store.log.damaged
    text = f"run {args.run!r} opens from a snapshot of its first {seq} entries"
    if damaged:
        text += f"; without {', '.join(damaged)}, which could not be read"
    return {"seq": seq, "damaged": damaged, "text": text}


def fill(args: argparse.Namespace) -> Report:
    # Imported here, for the other commands need neither torch nor a backbone.
    from diki_ray.clip.trust import named_backbone
    from diki_ray.runs.fill import fill_class_means
    from diki_ray.runs.stored_run import config_of

    told = named_backbone(args.backbone, args.pretrained, args.directory)
    with _held(args) as (store, epoch):
        config = config_of(store, args.config, told)
        named = args.config is not None
        filled = fill_class_means(store, epoch, config, lambda task: print(f"{plain(task)} …", file=sys.stderr), named)
    text = f"{len(filled)} module(s) have class means now" if filled else "every module has class means already"
    return {"filled": filled, "text": f"{text}; routing.density=classes answers by them."}


def main(action: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> int:
    """Do one of the above and print its report; the exit code."""
    try:
        report = action(args)
    except LeaseHeldError as error:
        raise UserError(f"{error} (for this command: --take-over)") from None
    exit_code = report.pop("exit_code", 0)
    if args.json:
        print_json({name: value for name, value in report.items() if name != "text"})
    else:
        _print(report)
    return int(exit_code)


def _named(args: argparse.Namespace) -> str:
    return f"--storage {shlex.quote(args.storage)} --run {shlex.quote(args.run)}"


@contextmanager
def _held(args: argparse.Namespace, salvage: bool = False) -> Iterator[tuple[RunStore, int]]:
    store = _existing(args, salvage)
    epoch = store.acquire(this_process("diki-ray store"), take_over=args.take_over)
    try:
        yield store, epoch
    finally:
        store.release(epoch)


def _existing(args: argparse.Namespace, salvage: bool = False) -> RunStore:
    store = RunStore.open(args.storage, args.run, salvage)
    if store.version == 0:
        known = ", ".join(RunStore.runs(args.storage)) or "none"
        raise UserError(f"{args.storage} has no run {args.run!r}; it has: {known}")
    return store


def _run_line(store: RunStore) -> dict[str, Any]:
    lease, left_s = store.state.lease, store.log.seconds_held()
    return {
        "run": store.run,
        "tasks": len(store.modules()),
        "bytes": sum(entry.num_bytes for entry in store.modules()),
        "version": store.version,
        "held by": holder_of(lease).describe() if lease is not None and left_s > 0 else "",
    }


def _entry_line(entry: Entry) -> dict[str, Any]:
    return {
        "seq": entry.seq,
        "kind": entry.kind,
        "task": entry.task,
        "by": holder_of(entry).describe() if entry.kind == "lease" else "",
        "bytes": entry.num_bytes,
        "time": datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "key": entry.key,
        "digest": entry.digest,
    }


def _print(report: Report) -> None:
    shown = console(soft_wrap=True)
    for value in report.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            table = Table()
            for name in value[0]:
                table.add_column(name, no_wrap=name != "what")
            for line in value:
                table.add_row(*(_cell(name, cell) for name, cell in line.items()))
            shown.print(table)
    shown.print(report["text"], markup=False, highlight=False)


def _cell(name: str, cell: Any) -> Text:
    if isinstance(cell, int):
        return Text(f"{cell:,}")
    # Of a digest enough to tell it from others; --json has it whole.
    return Text(str(cell)[:12] if name in ("key", "digest") else str(cell))
