"""From a source to a prepared data set: choose the images, write the shards, say what was found.

Three steps, so that the middle one can run anywhere: `plan` lists and decides (no image is opened), `write_job` writes
one shard (a pure function of its job, restartable), `finish` adds the index, last. `ensure` does all three in this
process; `diki-ray prepare` spreads the middle one over a cluster.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from diki_ray.config.templates import template_fault
from diki_ray.data.completeness import differing_sizes, shortcomings
from diki_ray.data.images import UndecodableImageError, at_model_size, decode_image
from diki_ray.data.index import DatasetIndex, Shard, Split, find_prepared
from diki_ray.data.shards import Sample, encode_sample, shard_file, write_shard
from diki_ray.data.sources import EMBEDDED, RawDataset, RawItem, Reader, open_source
from diki_ray.data.sources.choice import Choice, choose, keys_of
from diki_ray.errors import DataError
from diki_ray.store.files import delete, join, read_bytes, scheme_of, write_bytes

DEFAULT_TEMPLATE = "a photo of a {}."
_SHARDS_WANTED = 32
_MIN_SHARD_BYTES, _MAX_SHARD_BYTES = 2**20, 32 * 2**20


@dataclass(frozen=True)
class Settings:
    """What decides the prepared bytes beside the source.

    `shots`: training images a class, None for all. `resize_px`: None keeps the files' own bytes; else images are
    stored at that size, by CLIP's resize (bicubic, shorter side) and centre crop, as `image_format` "png" or "jpeg".
    """

    shots: int | None = None
    seed: int = 0
    resize_px: int | None = None
    image_format: str = "png"

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise DataError(f"shots is {self.shots}; allowed is 1 or more, or none for all images")
        if self.resize_px is not None and not 8 <= self.resize_px <= 4096:
            raise DataError(f"resize_px is {self.resize_px}; allowed is 8 to 4096")
        if self.image_format not in ("png", "jpeg"):
            raise DataError(f"image_format is {self.image_format!r}; allowed are 'png' and 'jpeg'")


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: everything a process elsewhere needs. `items` and `keys` go together."""

    folder: str
    file: str
    split: str
    items: tuple[RawItem, ...]
    keys: tuple[str, ...]
    reader: Reader
    num_classes: int
    settings: Settings


@dataclass(frozen=True)
class ShardResult:
    """What became of a job. `shard` is None if no image of it could be used; `skipped` has (ref, reason) pairs."""

    split: str
    shard: Shard | None
    samples_per_class: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Preparation:
    """A data set to be prepared: where it goes and by which settings. What it consists of is worked out when asked."""

    folder: str
    raw: RawDataset
    settings: Settings
    templates: tuple[str, ...]
    digest: str
    source: str

    @cached_property
    def choice(self) -> Choice:
        """The images of each split; DataError if there is none to train on."""
        return choose(self.raw, shots=self.settings.shots, seed=self.settings.seed)

    @cached_property
    def jobs(self) -> tuple[ShardJob, ...]:
        """The shards to write."""
        raw, settings = self.raw, self.settings
        return tuple(
            ShardJob(self.folder, shard_file(split, n), split, items, keys, raw.reader, len(raw.class_names), settings)
            for split, chosen in self.choice.splits.items()
            for n, (items, keys) in enumerate(_cut(chosen, settings))
        )


def plan(
    source: str,
    root: str,
    *,
    name: str | None = None,
    template: str | Sequence[str] | None = None,
    split_protocol: str | None = None,
    class_names: Sequence[str] = (),
    settings: Settings | None = None,
) -> Preparation:
    """List the source and decide everything but the bytes. Opens no image; DataError for what cannot be prepared."""
    raw = open_source(source, name=name, split_protocol=split_protocol, class_names=class_names)
    label = source if source.startswith(EMBEDDED) else Path(source).resolve().name
    return plan_listed(raw, root, label, template=template, settings=settings or Settings())


def plan_listed(
    raw: RawDataset, root: str, source: str, *, template: str | Sequence[str] | None, settings: Settings
) -> Preparation:
    """The same of a data set that is listed already. source: what people know it by."""
    templates = (template,) if isinstance(template, str) else tuple(template or raw.templates or (DEFAULT_TEMPLATE,))
    for text in templates:
        if (fault := template_fault(text)) is not None:
            raise DataError(f"{raw.name}: the template {text!r:.200} {fault}")
    digest = _digest(raw, templates, settings)
    folder = join(root, f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', raw.name)}-{digest[:8]}")
    return Preparation(folder, raw, settings, templates, digest, source)


def _digest(raw: RawDataset, templates: tuple[str, ...], settings: Settings) -> str:
    listed = {} if raw.content_is_all else raw.splits
    content = {
        "class_names": raw.class_names,
        "content": raw.content,
        "items": {s: sorted([i.ref, i.label, i.num_bytes] for i in items) for s, items in listed.items()},
        "layout": [raw.layout, raw.split_protocol],
        "settings": asdict(settings),
        "templates": templates,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cut(items: Sequence[RawItem], settings: Settings) -> Iterable[tuple[tuple[RawItem, ...], tuple[str, ...]]]:
    """Runs of items, one a shard: about _SHARDS_WANTED, so that streams differ and writing spreads, in 1 … 32 MiB."""
    keys = keys_of(items)
    stored = settings.resize_px and settings.resize_px**2 * (2 if settings.image_format == "png" else 1) // 2
    sizes = [(stored or item.num_bytes) + 2048 for item in items]
    limit = min(_MAX_SHARD_BYTES, max(_MIN_SHARD_BYTES, sum(sizes) // _SHARDS_WANTED))
    start, filled = 0, 0
    for i, size in enumerate(sizes):
        if filled and filled + size > limit:
            yield tuple(items[start:i]), tuple(keys[start:i])
            start, filled = i, 0
        filled += size
    if items:
        yield tuple(items[start:]), tuple(keys[start:])


def _done_uri(job: ShardJob) -> str:
    return join(job.folder, f"{job.file}.done.json")


def write_job(job: ShardJob) -> ShardResult:
    """Write one shard and a note that it is done; a job that was done before is only checked. Durable when it returns.

    Images that cannot be read or decoded are left out with their reason; StorageError if the shard can't be written.
    """
    done = _done_before(job)
    if done is not None:
        return done
    encoded: list[bytes] = []
    per_class = [0] * job.num_classes
    skipped: list[tuple[str, str]] = []
    for item, key in zip(job.items, job.keys, strict=True):
        try:
            data, extension = job.reader.read(item.ref)
            image = decode_image(data)  # also when the bytes are kept: better found out now than in training
            if job.settings.resize_px is not None:
                data, extension = at_model_size(image, job.settings.resize_px, job.settings.image_format)
        except UndecodableImageError as error:
            skipped.append((item.ref, error.reason))
            continue
        except (OSError, DataError) as error:
            skipped.append((item.ref, f"unreadable ({type(error).__name__})"))
            continue
        encoded.append(encode_sample(Sample(key, data, extension, item.label), job.num_classes))
        per_class[item.label] += 1
    shard = write_shard(job.folder, job.file, encoded) if encoded else None
    note = {"shard": shard.as_json() if shard else None, "samples_per_class": per_class, "skipped": skipped}
    write_bytes(_done_uri(job), json.dumps(note).encode())
    return ShardResult(job.split, shard, tuple(per_class), tuple(skipped))


def _done_before(job: ShardJob) -> ShardResult | None:
    try:
        note = json.loads(read_bytes(_done_uri(job)))
        shard = Shard.from_json(note["shard"]) if note["shard"] else None
        if shard and hashlib.sha256(read_bytes(join(job.folder, shard.file))).hexdigest() != shard.sha256:
            return None
        skipped = tuple((ref, reason) for ref, reason in note["skipped"])
        return ShardResult(job.split, shard, tuple(note["samples_per_class"]), skipped)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def finish(preparation: Preparation, results: Iterable[ShardResult], max_skipped: int | None = None) -> DatasetIndex:
    """Write the index, after which the data set exists. `results` in any order.

    DataError if more than `max_skipped` images (default: 1 %, at least 8) could not be used, naming the first.
    """
    results = list(results)
    raw = preparation.raw
    skipped = sorted(pair for result in results for pair in result.skipped)
    num_items = sum(len(items) for items in preparation.choice.splits.values())
    budget = max(8, num_items // 100) if max_skipped is None else max_skipped
    reasons = Counter(reason for _, reason in skipped)
    if len(skipped) > budget:
        raise DataError(
            f"{raw.name}: {len(skipped)} of {num_items} images could not be used and the budget is {budget}; the first "
            f"is {skipped[0][0]} ({skipped[0][1]}). By reason: {dict(reasons)}"
        )
    unusable = Counter(result.split for result in results for _ in result.skipped)
    splits = {}
    for split in preparation.choice.splits:
        of_split = [r for r in results if r.split == split]
        shards = sorted((r.shard for r in of_split if r.shard), key=lambda shard: shard.file)
        counts = zip(*(r.samples_per_class for r in of_split), strict=True)
        per_class = tuple(map(sum, counts)) or (0,) * len(raw.class_names)
        splits[split] = Split(split, tuple(shards), per_class)
    index = DatasetIndex(
        uri=preparation.folder,
        name=raw.name,
        class_names=raw.class_names,
        templates=preparation.templates,
        split_protocol=raw.split_protocol,
        splits=splits,
        provenance={
            "source": preparation.source,
            "layout": raw.layout,
            "settings": asdict(preparation.settings),
            "digest": preparation.digest,
            "notes": list(preparation.choice.notes),
            "left_out": dict(sorted((Counter(preparation.choice.skipped) + reasons).items())),
            "left_out_images": [f"{ref}: {reason}" for ref, reason in skipped[:50]],
            "sizes_that_differ": differing_sizes(raw, preparation.choice, unusable),
        },
    )
    index.save()
    for job in preparation.jobs:
        delete(_done_uri(job))
    return index


Run = Callable[[Callable[[ShardJob], ShardResult], Sequence[ShardJob]], Iterable[ShardResult]]


def ensure(
    source: str,
    root: str,
    *,
    name: str | None = None,
    template: str | Sequence[str] | None = None,
    shots: int | None = None,
    seed: int = 0,
    split_protocol: str | None = None,
    class_names: Sequence[str] = (),
    resize_px: int | None = None,
    image_format: str = "png",
    max_skipped: int | None = None,
    run: Run = map,
) -> DatasetIndex:
    """The prepared data set of a source, prepared now unless it is there: in `root/<name>-<digest>`.

    `source` is a prepared folder (any place with index.json; used as it is), "embedded:<task>", a manifest or a folder
    in any known layout. The same source and settings give the same bytes. `template` replaces the data set's own (the
    first trains, the mean of all tests). `run` maps `write_job` over jobs, in any order.

    Raises DataError for what cannot be prepared, StorageError for what cannot be read or written.
    """
    settings = Settings(shots, seed, resize_px, image_format)
    found = look(
        source,
        root,
        name=name,
        template=template,
        split_protocol=split_protocol,
        class_names=class_names,
        settings=settings,
    )
    return found if isinstance(found, DatasetIndex) else made(found, max_skipped, run)


def look(
    source: str,
    root: str,
    *,
    name: str | None = None,
    template: str | Sequence[str] | None = None,
    split_protocol: str | None = None,
    class_names: Sequence[str] = (),
    settings: Settings,
) -> DatasetIndex | Preparation:
    """The first half of `ensure`, which writes nothing: the data set if it is prepared, else a plan for `made`."""
    prepared = load_prepared(source)
    if prepared is None:
        return plan(
            source,
            root,
            name=name,
            template=template,
            split_protocol=split_protocol,
            class_names=class_names,
            settings=settings,
        )
    if settings.shots is not None and prepared.provenance.get("settings", {}).get("shots") != settings.shots:
        raise DataError(f"{source} is already prepared: draw {settings.shots} shots from its original source instead")
    templates = (template,) if isinstance(template, str) else tuple(template or prepared.templates)
    return replace(prepared, name=name or prepared.name, templates=templates)


def made(preparation: Preparation, max_skipped: int | None = None, run: Run = map) -> DatasetIndex:
    """The second half of `ensure`: the data set, written now unless it was finished before."""
    found = find_finished(preparation)
    return found or finish(preparation, run(write_job, preparation.jobs), max_skipped)


def load_prepared(source: str) -> DatasetIndex | None:
    """The data set at `source` if that is a prepared one, or the name of one without its digest (`find_prepared`);
    remote places can only be that. DataError if it is damaged, or if several have the name."""
    if source.startswith(EMBEDDED):
        return None
    found = find_prepared(source)
    if found is None and not scheme_of(source):
        return None
    return DatasetIndex.load(found or source)


def find_finished(preparation: Preparation) -> DatasetIndex | None:
    """The data set if this preparation was finished before and all its local files are still whole in size."""
    try:
        index = DatasetIndex.load(preparation.folder)
    except DataError:
        return None  # never finished, or damaged: written again
    shards = [shard for split in index.splits.values() for shard in split.shards]
    if not scheme_of(index.uri):
        for shard in shards:
            path = Path(index.shard_uri(shard))
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                return None
    return index


def summary(index: DatasetIndex) -> list[str]:
    """What a prepared data set holds and what was left out, one line each, for people."""
    lines = [f"{index.name}: {len(index.class_names)} classes, {index.split_protocol} split, in {index.uri}"]
    for split in index.splits.values():
        counts = split.samples_per_class
        lines.append(
            f"  {split.name:5} {split.num_samples:7,} images, {min(counts)} to {max(counts)} a class, "
            f"{len(split.shards)} shards, {split.num_bytes / 2**20:.1f} MiB"
        )
    about = index.provenance
    lines += [f"  {phrase}" for phrase in shortcomings(index)]
    lines += [f"    {image}" for image in about.get("left_out_images", [])[:5]]
    return lines + [f"  note: {note}" for note in about.get("notes", [])]
