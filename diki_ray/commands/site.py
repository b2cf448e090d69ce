"""`diki-ray site`: a site's part of a task made, and parts merged into a module of a run."""

from __future__ import annotations

import argparse
import shlex

from diki_ray.commands.output import print_json, print_text
from diki_ray.report.next_steps import typed
from diki_ray.runs.sites import differences, make_part, merge_parts, read_part
from diki_ray.runs.stopping import stoppable
from diki_ray.store.files import write_bytes


@stoppable
def part(args: argparse.Namespace) -> int:
    """Make a part, write it and say what is in it; the exit code."""
    classes = None if args.classes is None else [name.strip() for name in args.classes.split(",")]
    leave_out = args.small_classes == "leave-out"
    made, left_out = make_part(args.config, args.task, args.data, classes, args.min_count, leave_out)
    write_bytes(args.file, blob := made.to_bytes())
    counts = dict(zip(made.header.class_names, made.statistics.counts.tolist(), strict=True))
    if args.json:
        print_json({"part": made.content, "task": made.header.task, "counts": counts, "left_out": left_out})
        return 0
    images, (num_classes, dimensions) = made.statistics.count, made.statistics.first.shape
    print_text(f"{args.file}: {len(blob):,} bytes, part {made.content[:12]} of task {made.header.task!r}")
    print_text(f"It holds the names of {num_classes} classes and how many images each has, {images:,} in all:")
    print_text("  " + ", ".join(f"{name} {count:,}" for name, count in counts.items() if count))
    if left_out:
        print_text(f"Left out, as they have fewer than {args.min_count}: {', '.join(left_out)}")
    if images <= dimensions:
        print_text(
            f"note: that is no more images than the {dimensions} dimensions of their features, and sums of so few say "
            "much about each of them (docs/sites.md)"
        )
    return 0


@stoppable
def merge(args: argparse.Namespace) -> int:
    """Merge parts, commit the module and say what to type next; the exit code."""
    parts = [(file, read_part(file)) for file in args.parts]
    entry, module = merge_parts(args.config, parts, args.min_count)
    unlike = differences([part for _, part in parts])
    if args.json:
        print_json({"task": entry.task, "digest": entry.digest, "count": module.moments.count, "differences": unlike})
        return 0
    run = args.config.run
    print_text(f"run {run.name!r}: task {entry.task!r} of {len(parts)} parts, {module.moments.count:,} images")
    if unlike:
        print_text(
            f"note: made with different {', '.join(name.replace('_', ' ') for name in unlike)}, so the sums are those "
            "of one site up to the rounding of features"
        )
    where = f"--storage {shlex.quote(run.storage)} --run {shlex.quote(run.name)}"
    print_text(f"Answer images with it:\n  {typed()} predict photo.jpg {where}")
    return 0
