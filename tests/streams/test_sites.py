"""Parts of a task that sites make of images they do not share: exact sums, what is refused, and what a part holds."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning import learnt, modules, tiny_plan
from noise_images import draw
from PIL import Image
from tiny_backbone import write_tiny_backbone

from diki_ray.commands.app import run as command
from diki_ray.config import Config, parse
from diki_ray.errors import ConfigError, CorruptError, DataError
from diki_ray.learning import site_part
from diki_ray.learning.module import TaskModule, read_tensors, write_tensors
from diki_ray.learning.site_part import SitePart
from diki_ray.learning.statistics import GRID, Statistics
from diki_ray.prediction.run_predictor import load_predictor
from diki_ray.runs.sites import differences, make_part, merge_parts, read_part
from diki_ray.store.held_here import held_here
from diki_ray.store.run_store import RunStore

SITES: dict[str, dict[str, int]] = {
    "north": {"crack": 7, "dent": 5},
    "south": {"crack": 3, "dent": 9, "scratch": 4},
    "east": {"crack": 11, "dent": 1},
}
CLASSES = ("crack", "dent", "scratch")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for each site, and `all`, which has the images of all of them; what is prepared of them, and
    the backbone."""
    folder = tmp_path_factory.mktemp("sites")
    for site, counts in SITES.items():
        for name in (site, "all"):
            draw(folder / name, counts, site)
    write_tiny_backbone(folder)
    return folder


@pytest.fixture
def sites(drawn: Path, tmp_path: Path) -> Path:
    """The same folders, to which a test can add."""
    for path in drawn.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="module")
def south(drawn: Path) -> SitePart:
    return make_part(agreed(drawn), data=str(drawn / "south"))[0]


def agreed(folder: Path, **sections: Any) -> Config:
    """The configuration that all have."""
    tree = {
        "run": {"name": "defects", "storage": str(folder / "storage")},
        "method": {"name": "classes"},
        "backbone": {"name": str(folder / "tiny_backbone.py")},
        "train": {"batch_size": 8},
        "data": {"root": str(folder / "prepared")},
        "tasks": [{"data": "images", "name": "defects", "template": "a photo of a {}."}],
    }
    return parse(tree | sections)


def parts_of(folder: Path, config: Config, **options: Any) -> list[tuple[str, SitePart]]:
    options = {"classes": CLASSES} | options
    return [(site, make_part(config, data=str(folder / site), **options)[0]) for site in SITES]


def test_parts_of_three_sites_are_one_sites_module_to_the_bit_in_any_order(sites: Path) -> None:
    config = agreed(sites)
    parts = parts_of(sites, config)
    assert differences([part for _, part in parts]) == []
    merged = {merge_parts(config, order)[0].digest for order in itertools.permutations(parts)}
    assert len(merged) == 1
    store = RunStore.open(config.run.storage, "defects")
    [entry] = store.modules()
    module = TaskModule.from_bytes(store.read_module(entry.digest))
    there = [{"data": str(sites / "all"), "name": "defects", "template": "a photo of a {}."}]
    at_one_place = tiny_plan(sites, method={"name": "classes"}, train={"batch_size": 8}, tasks=there)
    [expected] = modules(at_one_place, learnt(at_one_place))
    assert (module.class_names, module.templates) == (expected.class_names, expected.templates)
    for name, array in expected.class_statistics.tensors().items():
        np.testing.assert_array_equal(module.class_statistics.tensors()[name], array)
    assert module.class_statistics.counts.tolist() == [21, 15, 4]
    one_part, _ = make_part(config, data=str(sites / "all"))
    assert one_part.statistics.tensors().keys() == {"counts", "first", "second"}
    for name, array in one_part.statistics.tensors().items():
        np.testing.assert_array_equal(module.class_statistics.tensors()[name], array)


def test_merging_again_with_one_part_more_or_less_gives_the_sums_of_exactly_these(sites: Path) -> None:
    config = agreed(sites)
    parts = parts_of(sites, config)
    digests = [merge_parts(config, chosen)[0].digest for chosen in (parts[:2], parts, parts[:2])]
    assert digests[0] == digests[2] != digests[1]
    store = RunStore.open(config.run.storage, "defects")
    [entry] = store.modules()  # the former module is replaced
    assert entry.digest == digests[0]
    found = TaskModule.from_bytes(store.read_module(entry.digest)).class_statistics
    assert found.counts.tolist() == [10, 14, 4]
    draw(sites / "two", SITES["north"], "north")
    draw(sites / "two", SITES["south"], "south")
    expected, _ = make_part(config, data=str(sites / "two"), classes=CLASSES)
    for name, array in expected.statistics.tensors().items():
        np.testing.assert_array_equal(found.tensors()[name], array)


def test_the_merged_run_answers_from_its_storage_as_one_site_would(sites: Path) -> None:
    config = agreed(sites)
    photo = Image.open(sites / "all/test/crack/north0.png").convert("RGB")
    merge_parts(config, parts_of(sites, config))
    [answer] = load_predictor(config.run.storage, "defects", config).answer([photo])
    alone = config.model_copy(update={"run": config.run.model_copy(update={"name": "alone"})})
    merge_parts(alone, [("all", make_part(alone, data=str(sites / "all"))[0])])
    assert list(load_predictor(config.run.storage, "alone", alone).answer([photo])) == [answer]
    assert answer.task == "defects"


def test_a_part_holds_sums_counts_and_names_and_nothing_else(drawn: Path, south: SitePart) -> None:
    part = south
    header, tensors = read_tensors(part.to_bytes())
    assert set(tensors) == {"counts", "first", "second"}
    assert set(header) == {
        *("site_part", "task", "class_names", "templates", "backbone", "precision", "data", "min_count", "made_with"),
        "checksum",
    }
    assert str(drawn) not in json.dumps(header)  # no path of the site, and not when it was made
    again = SitePart.from_bytes(part.to_bytes())
    assert (again.to_bytes(), again.content) == (part.to_bytes(), part.content)


def test_the_same_images_are_not_counted_twice_whatever_their_files_are_called(sites: Path) -> None:
    config = agreed(sites)
    north, _ = make_part(config, data=str(sites / "north"), classes=CLASSES)
    shutil.copytree(sites / "north", sites / "renamed")
    copy, _ = make_part(config, data=str(sites / "renamed"), classes=CLASSES)
    smaller, _ = make_part(config, data=str(sites / "north"), classes=CLASSES, min_count=6, leave_out_small=True)
    assert smaller.content != north.content
    for other in (copy, smaller):
        with pytest.raises(ConfigError, match=r"a\.part and b\.part are of the same images"):
            merge_parts(config, [("a.part", north), ("b.part", other)])
    assert RunStore.open(config.run.storage, "defects").modules() == ()


def test_a_class_of_too_few_images_is_refused_or_in_no_sum(sites: Path) -> None:
    config = agreed(sites)
    with pytest.raises(DataError, match=r"'crack', 'scratch' would have fewer than 5 images here"):
        make_part(config, data=str(sites / "south"), min_count=5)
    part, left_out = make_part(config, data=str(sites / "south"), min_count=5, leave_out_small=True)
    assert left_out == ["crack", "scratch"]
    assert part.statistics.counts.tolist() == [0, 9, 0]
    draw(sites / "dents", {"dent": 9}, "south")
    dents, _ = make_part(config, data=str(sites / "dents"), classes=CLASSES)
    assert part.content == dents.content  # nothing of the others is in the sums over all classes either
    with pytest.raises(ConfigError, match=r"south has a class of fewer than 4 images"):
        merge_parts(config, parts_of(sites, config)[:2], min_count=4)
    with pytest.raises(DataError, match="no class of at least 100 images"):
        make_part(config, data=str(sites / "south"), min_count=100, leave_out_small=True)


def test_images_that_cannot_be_read_do_not_count_for_the_minimum(sites: Path) -> None:
    config = agreed(sites, data={"root": str(sites / "prepared"), "max_skipped_fraction": 0.5})
    shutil.copytree(sites / "south", sites / "damaged")
    path = sites / "damaged/train/scratch/south0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="'scratch' would have fewer than 4"):
        make_part(config, data=str(sites / "damaged"), min_count=4)


def test_parts_that_mean_other_things_are_not_added(sites: Path) -> None:
    config = agreed(sites)
    north, south, _ = parts_of(sites, config)
    other_words = agreed(sites, tasks=[{"data": "images", "name": "defects", "template": "a dent: {}."}])
    half = agreed(sites, backbone=config.backbone.model_dump() | {"precision": "bfloat16"})
    smaller = sites / "other.py"  # the same weights, another preprocessing
    smaller.write_text(Path(config.backbone.name).read_text().replace("T.Resize(32)", "T.Resize(40)"))
    cropped = agreed(sites, backbone={"name": str(smaller)})
    for other, what in ((other_words, "templates"), (half, "precision"), (cropped, "backbone")):
        part, _ = make_part(other, data=str(sites / "south"), classes=CLASSES)
        with pytest.raises(ConfigError, match=f"north and south differ in their {what}"):
            merge_parts(config, [north, ("south", part)])
    two_classes, _ = make_part(config, data=str(sites / "east"))
    with pytest.raises(ConfigError, match="differ in their class names: make them again with one configuration, and"):
        merge_parts(config, [north, ("east", two_classes)])
    with pytest.raises(ConfigError, match="another backbone, image preprocessing or precision"):
        merge_parts(cropped, [north, south])
    with pytest.raises(DataError, match="has images of 'scratch', which the sites have not agreed on"):
        make_part(config, data=str(sites / "south"), classes=("crack", "dent"))
    assert RunStore.open(config.run.storage, "defects").modules() == ()


def test_sites_share_sums_and_no_training(sites: Path) -> None:
    trained = {"name": "diki", "image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2}
    with pytest.raises(ConfigError, match=r"method\.name=diki trains on images"):
        make_part(agreed(sites, method=trained), data=str(sites / "north"))
    config = agreed(sites)
    elsewhere = learnt(tiny_plan(sites, method=trained, train={"epochs": 1}))
    [module] = elsewhere.modules()
    with held_here(config.run.storage, "defects", "test") as run:
        run.commit_module(module.key, module.task, elsewhere.read_module(module.digest))
    with pytest.raises(ConfigError, match="has learnt 'digits' with another method or backbone"):
        merge_parts(config, parts_of(sites, config))


def test_what_differs_between_sites_and_only_rounds_is_said(sites: Path, capsys: Any) -> None:
    config = agreed(sites)
    north, _ = make_part(config, data=str(sites / "north"), classes=CLASSES)
    south, _ = make_part(agreed(sites, train={"batch_size": 5}), data=str(sites / "south"), classes=CLASSES)
    assert differences([north, south]) == ["batch_size"]
    entry, _ = merge_parts(config, [("north", north), ("south", south)])
    assert entry.metadata["sites"] == 2
    for name, part in (("north", north), ("south", south)):
        (sites / f"{name}.part").write_bytes(part.to_bytes())
    (sites / "agreed.yaml").write_text(config.to_yaml())
    files = [str(sites / name) for name in ("north.part", "south.part")]
    assert command(None, ["site", "merge", *files, "--config", str(sites / "agreed.yaml"), "--min-count", "1"]) == 0
    assert "note: made with different batch size, so the sums are those of one site up to" in capsys.readouterr().out


def test_a_part_of_few_images_says_that_much_can_be_told_from_it(sites: Path, capsys: Any) -> None:
    (sites / "agreed.yaml").write_text(agreed(sites).to_yaml())
    draw(sites / "many", {"crack": 20, "dent": 13}, "north")  # a feature has 32 dimensions
    for name, images, noted in (("north", 12, True), ("many", 33, False)):
        given = ["--config", str(sites / "agreed.yaml"), "--data", str(sites / name), "--min-count", "1"]
        assert command(None, ["site", "part", str(sites / f"{name}.part"), *given]) == 0
        said = capsys.readouterr().out
        assert f"{images} in all" in said
        assert ("note: that is no more images than the 32 dimensions of their features" in said) == noted


# What comes from elsewhere


def resealed(part: SitePart, change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]) -> bytes:
    """A part with other content and a checksum that holds."""
    header, tensors = read_tensors(part.to_bytes())
    del header["checksum"]
    tensors = {name: array.copy() for name, array in tensors.items()}
    change(header, tensors)
    return write_tensors(header | {"checksum": site_part._sha256(header, tensors)}, tensors)


def sums(change: Callable[[Statistics], Any]) -> Callable[[dict[str, Any], dict[str, np.ndarray]], Any]:
    def changed(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        statistics = Statistics.from_tensors(tensors)
        change(statistics)
        tensors |= statistics.tensors()

    return changed


def swap_squares(statistics: Statistics) -> None:
    """The trace stays, and one variance becomes negative."""
    squares = statistics.second
    squares[1, 1], squares[0, 0] = squares[1, 1] + squares[0, 0], 0


HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, np.ndarray]], Any]] = {
    "a later format": lambda h, t: h.update(site_part=2),
    "no task": lambda h, t: h.pop("task"),
    "a class twice": lambda h, t: h.update(class_names=["crack", "crack", "dent"]),
    "classes as a number": lambda h, t: h.update(class_names=3),
    "a class too many": lambda h, t: h["class_names"].append("more"),
    "a template with a format": lambda h, t: h.update(templates=["{:>99999999}"]),
    "another precision": lambda h, t: h.update(precision="torch.int8"),
    "a digest that is a path": lambda h, t: h.update(backbone="../../etc"),
    "a field more": lambda h, t: h.update(command="run me"),
    "a count in words": lambda h, t: h.update(min_count="ten"),
    "fewer images than it says": lambda h, t: h.update(min_count=4),
    "sums of no dimension": lambda h, t: t.update(first=np.zeros((1, 3, 0), np.uint8)),
    "sums of a billion dimensions": lambda h, t: t.update(first=np.zeros((0, 3, 10**9), np.uint8)),
    "floats": lambda h, t: t.update(first=t["first"].astype(np.float32)),
    "counts that are not whole": lambda h, t: t.update(counts=np.full(3, np.nan)),
    "an array more": lambda h, t: t.update(images=np.zeros(3, np.uint8)),
    "a negative count": sums(lambda s: np.copyto(s.counts, [-1, 13, 4])),
    "counts beyond counting": sums(lambda s: np.copyto(s.counts, [2**62, 2**62, 2**62])),
    "no image": sums(lambda s: [np.copyto(a, 0) for a in (s.counts, s.first, s.second)]),
    "sums larger than their images": sums(lambda s: np.copyto(s.first, int(GRID) * 100)),
    "sums far below zero": sums(lambda s: np.copyto(s.first, -(2**62))),
    "squares beyond their images": sums(lambda s: np.copyto(s.second, 2**62)),
    "a norm other than 1": sums(lambda s: np.copyto(s.second, s.second // 2)),
    "a negative variance": sums(swap_squares),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_part_that_no_site_makes_is_read(tmp_path: Path, south: SitePart, name: str) -> None:
    path = tmp_path / "hostile.part"
    path.write_bytes(resealed(south, lambda h, t: None))
    assert read_part(str(path)).content == south.content
    path.write_bytes(resealed(south, HOSTILE[name]))
    with pytest.raises(CorruptError, match=r"hostile\.part is refused"):
        read_part(str(path))


def test_a_damaged_part_is_found_by_its_checksum(tmp_path: Path, south: SitePart) -> None:
    blob = south.to_bytes()
    path = tmp_path / "south.part"
    for place in range(8, len(blob), len(blob) // 40):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        with pytest.raises(CorruptError):
            read_part(str(path))
    path.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(CorruptError):
        read_part(str(path))


@pytest.mark.timeout(60)
def test_only_a_regular_file_of_a_limited_size_is_read_as_a_part(tmp_path: Path, capsys: Any) -> None:
    sites = tmp_path
    (sites / "all").mkdir()
    (sites / "agreed.yaml").write_text("run: {name: r}\nmethod: {name: classes}\ntasks: [{data: x, name: defects}]\n")
    os.mkfifo(sites / "pipe.part")
    with open(sites / "sparse.part", "wb") as file:
        file.truncate(2**30 + 5)
    for name in ("pipe.part", "sparse.part", "none.part", "all"):
        assert command(None, ["site", "merge", str(sites / name), "--config", str(sites / "agreed.yaml")]) == 2
        said = capsys.readouterr().err
        assert name in said
        assert "Traceback" not in said
