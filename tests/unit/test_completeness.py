"""What a data set lacks against the published split is known, said, and part of a result's name."""

import json
from dataclasses import replace
from pathlib import Path

from diki_ray.config import Config
from diki_ray.data import prepare
from diki_ray.data.completeness import is_incomplete, shortcomings
from diki_ray.data.prepare import Preparation, Settings
from diki_ray.data.sources.embedded import embedded_dataset
from diki_ray.runs.plan import Plan, PlannedTask
from diki_ray.runs.results import protocol_of


def prepared(root: Path, known: dict[str, int], shots: int | None = None) -> prepare.DatasetIndex:
    """A few images of an embedded task as if they had been published in these numbers; one test image is damaged."""
    raw = embedded_dataset("digits", "digits")
    raw = replace(raw, splits={s: items[:12] for s, items in raw.splits.items()}, known_sizes=known)
    preparation = Preparation(str(root / "set"), raw, Settings(shots), ("a {}.",), "0" * 64, "made up")
    results = [prepare.write_job(job) for job in preparation.jobs]
    hurt = next(r for r in results if r.split == "test")
    results[results.index(hurt)] = replace(hurt, skipped=(("a.jpg", "truncated image"),))
    return prepare.finish(preparation, results)


def protocol_with(index: prepare.DatasetIndex, protocol: str) -> str:
    tree = {"run": {"name": "r"}, "protocol": protocol, "data": {"sources": "."}}
    task = PlannedTask("digits", index, ("a {}.",), 1, 0, "k", None)
    return protocol_of(Plan(Config.model_validate(tree), "d", 32, (task,)))


def test_a_whole_data_set_lacks_nothing_against_what_was_published(tmp_path: Path) -> None:
    index = prepared(tmp_path, {"train": 12, "val": 12, "test": 11})
    assert index.provenance["sizes_that_differ"] == {}
    assert not is_incomplete(index)
    assert protocol_with(index, "mtil-1/coop") == "mtil-1/coop/image"


def test_a_damaged_test_image_and_a_half_downloaded_split_are_said_and_mark_the_id(tmp_path: Path) -> None:
    index = prepared(tmp_path, {"train": 2944, "val": 12, "test": 12})
    assert index.provenance["sizes_that_differ"] == {
        "train": {"found": 12, "published": 2944},
        "test": {"found": 11, "published": 12},
    }
    text = "; ".join(shortcomings(index))
    assert "train has 12 images, the published split 2,944" in text
    assert "left out: 1 × truncated image" in text
    assert protocol_with(index, "mtil-1/coop") == "mtil-1/coop/image+incomplete"
    assert "train has 12 images" in "\n".join(prepare.summary(index))
    json.dumps(index.provenance)  # it is stored


def test_numbers_that_are_not_those_of_the_prepared_split_say_what_they_count(tmp_path: Path) -> None:
    """Where published without validation, ours is held out of the training images; and shots are drawn of all."""
    index = prepared(tmp_path, {"train": 3680, "test": 11})
    assert "train and val together have 24 images, the published split 3,680" in shortcomings(index)
    index = prepared(tmp_path / "shots", {"train": 2944, "val": 12, "test": 11}, shots=1)
    assert index.splits["train"].num_samples < 12
    assert "train, before shots were drawn, has 12 images, the published split 2,944" in shortcomings(index)


def test_classes_without_a_test_image_are_named(tmp_path: Path) -> None:
    index = prepared(tmp_path, {})
    test = index.splits["test"]
    index = replace(
        index, splits=index.splits | {"test": replace(test, samples_per_class=(0, *test.samples_per_class[1:]))}
    )
    assert f"no test image: {index.class_names[0]}" in "; ".join(shortcomings(index))
