"""The catalogue agrees with the papers, with itself, and with what the package is told to ship."""

from pathlib import Path

import pytest

from diki_ray.config import load as load_config
from diki_ray.config.protocols import (
    BENCHMARK_SPLITS,
    LABEL_SPACES,
    ROUTINGS,
    catalogue,
    entry_for_folder,
    protocol,
    protocols,
    published,
)
from diki_ray.errors import ConfigError, DataError
from diki_ray.runs.plan import tasks_of

CONFIGS = Path(__file__).parents[2] / "configs"

MTIL = ("Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPets")
MTIL = (*MTIL, "StanfordCars", "SUN397")


def test_every_protocol_is_there_and_well_formed():
    names = {"mtil-1", "mtil-2", "mtil-fs16-8", "mtil-fs16-11", "mtil-fs5", "odcl-cil", "xtail-1", "xtail-2"}
    assert set(protocols()) == names
    for p in protocols().values():
        assert len(set(p.order)) == len(p.order)
        assert set(p.order) <= set(MTIL)
        assert p.label_space in LABEL_SPACES
        assert p.own_split in BENCHMARK_SPLITS
        assert p.template is None or p.template.count("{}") == 1


def test_what_is_drawn_has_a_split_of_its_own_and_needs_no_folder():
    p = protocol("gem-styles")
    assert p.full_id("embedded", "image") == "gem-styles/embedded/image"
    with pytest.raises(DataError, match="one of"):
        p.full_id("coop", "image")
    config = load_config(CONFIGS / "gem_styles.yaml")
    tasks = tasks_of(config)
    assert [task.data for task in tasks] == [f"embedded:{name}" for name in p.order]
    assert {(task.template, task.shots, task.split) for task in tasks} == {(p.template, 16, None)}
    with pytest.raises(ConfigError, match=r"leave tasks out, and data\.sources out"):
        load_config(CONFIGS / "gem_styles.yaml", ["data.sources=somewhere"])


def test_orders_and_settings_are_the_published_ones():
    assert protocol("mtil-1").order == MTIL
    assert protocol("mtil-2").order[:3] == ("StanfordCars", "Food", "MNIST")
    assert set(protocol("mtil-2").order) == set(MTIL)
    assert len(protocol("mtil-fs16-8").order) == 8
    assert [protocol(f"mtil-{x}").shots for x in ("1", "fs16-8", "fs16-11", "fs5")] == [None, 16, 16, 5]
    assert (protocol("mtil-fs5").own_split, protocol("odcl-cil").label_space) == ("zscl", "seen")
    for name in ("xtail-1", "xtail-2"):
        p = protocol(name)
        assert set(p.order) == set(MTIL) - {"CIFAR100"}
        assert (p.shots, p.label_space, p.template) == (16, "all", "a photo of a {}.")
    with pytest.raises(DataError, match="known are mtil-1"):
        protocol("mtil-3")


def test_a_full_id_names_split_and_routing():
    ids = {p.full_id(s, r) for p in protocols().values() for s in BENCHMARK_SPLITS for r in ROUTINGS}
    assert len(ids) == 32
    assert protocol("mtil-1").full_id("coop", "batch") == "mtil-1/coop/batch"
    with pytest.raises(DataError, match="one of"):
        protocol("mtil-1").full_id("coop", "majority")


@pytest.mark.parametrize("split", BENCHMARK_SPLITS)
def test_every_benchmark_set_has_both_variants(split):
    total = 0
    for name in MTIL:
        variant = catalogue()[name].variants[split]
        total += variant.num_classes
        assert len(variant.class_names) in (0, variant.num_classes)
        assert all(t.count("{}") == 1 for t in variant.templates)
        assert variant.known_sizes.keys() == ({"train", "val", "test"} if split == "coop" else {"train", "test"})
    assert total == {"coop": 1200, "zscl": 1201}[split]


def test_template_ensembles_have_their_published_sizes():
    sizes = {name: len(catalogue()[name].variants["zscl"].templates) for name in MTIL}
    many = {"Caltech101": 34, "CIFAR100": 18, "StanfordCars": 9, "DTD": 8, "EuroSAT": 3, "Aircraft": 2, "SUN397": 2}
    assert sizes == dict.fromkeys(MTIL, 1) | many
    assert all(len(catalogue()[name].variants["coop"].templates) == 1 for name in MTIL)


def test_a_data_set_is_found_by_any_of_its_folders():
    for entry in catalogue().values():
        assert [entry_for_folder(f) for f in entry.folders] == [entry] * len(entry.folders)
    assert entry_for_folder("holiday pictures") is None


def test_published_results_say_what_they_can_be_compared_with():
    by_method = {r.method: r for r in published("mtil-1")}
    diki = by_method["DIKI"]
    assert (diki.split_protocol, diki.routing, diki.transfer, diki.average, diki.last) == (
        "coop",
        "batch",
        68.7,
        76.3,
        85.1,
    )
    assert len(diki.per_dataset["last"]) == len(protocol("mtil-1").order)
    assert by_method["ZSCL"].split_protocol == "zscl"
    assert by_method["DPW"].routing is None
    assert all(r.routing is None for r in published("mtil-fs16-11"))
    assert published("xtail-2") == ()
