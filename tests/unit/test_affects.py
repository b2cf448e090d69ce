"""What a setting affects is said at its field; digests, keys, leases and a sweep's question follow from that alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diki_ray.config import Config, parse
from diki_ray.config.affects import Affects, ChangesModule, affects, settings
from diki_ray.config.methods import METHOD_SECTIONS
from diki_ray.config.section import Section
from diki_ray.config.sweep import SweepConfig
from diki_ray.data.index import DatasetIndex, Shard, Split
from diki_ray.runs import plan as plans
from diki_ray.runs.plan import Plan, PlannedTask
from diki_ray.runs.results import is_of_configuration
from diki_ray.runs.sweep.sweep import question_of
from diki_ray.runs.sweep.trial import lease_of

TREE = {
    "run": {"name": "r", "seed": 3},
    "tasks": [{"data": "a"}, {"data": "b"}],
    "backbone": {"precision": "float32"},
    # Not said, the parts of a new run are as many as its workers.
    "train": {"epochs": 2, "min_steps": 10, "batch_size": 4, "lr": 0.5, "num_parts": 1},
}
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "diki": (
        {},
        "0c9c2be6d4a41b4011db39653835d0cef24cee3f38b2a788d3e18c8b8be78918",
        "d92bfd7812b06bfdceb1e68e1423025e8724d1c07a6711c23f31a761bf596bf7",
    ),
    "classes": (
        {},
        "d587ed95b425fa539954121e166a68f2e20cd9f6f2344f5c288dbf1c138235bf",
        "7a522cc0823afeda79fbb5145af0721c2991f9d17efc0af82732ffcc2a649f9b",
    ),
    "zero_shot": (
        {},
        "7150f021fa6a1b763d094bb84c0ed598d675b1bbed33a0eae129bea2c7efee74",
        "e32b70ef3f9f522f59cb23b885126dbb1f563bb862a340a25215149a45e39d80",
    ),
    "concat_prompts": (
        {"image_depth": 2},
        "0862a897935cb746417a2fc8b446ad1dde49e4316bf96871295fbe745f45fc2a",
        "467e3398e85ffe1ed1c99368949ffcb7de9a7b4426cb189d9f98c7b5fcacc469",
    ),
    "dpw": (
        {"rank": 3},
        "8a6ac7b70f49c4517d3ddbed405f45df21f779a72b977669ad8718f6b9f90a35",
        "608aa0dca56acb976aa90969187dfc730184e77c6d00b7923291eed134f020b3",
    ),
    "c_ada": (
        {},
        "410bb7aa420d34b5fee3abb01b5aebd40d13403c43e8fa83e98b6d45b0e7e875",
        "02ada548228c073fdeaec2f6817f7a644aae862cde42fa7455ca9d45cac12167",
    ),
    "sequential_lora": (
        {"against_forgetting": "ewc"},
        "e49361319ef2ca37de82be3a86a3ea20b5ad73af9c30fe1773e2ef0fea8b8585",
        "48a2eb7ae259a79004e6700888bbca2b200380eef7de4d92713b9642479303bd",
    ),
    "zscl": (
        {},
        "f06635a57d0214c3c141356f23fe81360d183603a3e4b72804d90479b950e7d9",
        "9e3f33b2ae7854794d6430c0b7aafc41e39e79ddba95138924d948327b00314f",
    ),
    "rail": (
        {"ridge": 1.0},
        "045331f34efbb79d44742e7d9694356e6b294a2f921302051379332360995a4a",
        "7f919594e30f0057e713c6ad99caf7567f6b6a9ce87c6712458768de303961fe",
    ),
    "keep_lora": (
        {"rank": 3},
        "4b77c12bc64c5016fe6d088aae44cae8514d568439980fa4a5d73de143d1cb30",
        "2ccbd98cc5def6677c026cc8292c31f00e2ca7524b8758505ecb273fe9a1a27f",
    ),
    "snd": (
        {},
        "a06a4d14e4742447f22bef5c1dee6cf329aa383a498c625d7c42929017369dff",
        "17b3d5da84eb66f4ae2da831f5c69d26dd10eed942e88f4ec2973d77788baaa9",
    ),
    "mulki": (
        {"rank": 3},
        "46255c632662cb9bb3746a4eddc10c8c58f4a706acb57ea4634785ce907d9afb",
        "f23af48b6577c50b52b3da2d9bc0a4701836034d87261adb500f8e80e4c71ded",
    ),
    "mahalanobis": (
        {"fusion": 0.5},
        "0170047374853471167c7ac555d619dd8040b09866e042f145b4e6bc3867b921",
        "0e700ea1c4c41a42eec7e30df6b306779aa3505be2bd12e66bd653257cef6be4",
    ),
}
"""Each method's settings, and the keys that the first version's code, or the method's own first, gave to the two tasks
below."""
FIRST = yaml.safe_load("""
run: {name: r, storage: runs, seed: 0, take_over: false}
tasks: [{data: a, name: null, template: null, shots: null, split: null}]
backbone: {name: embedded, pretrained: null, directory: null, precision: auto}
train: {optimizer: sgd, lr: 5.0, final_lr_fraction: 0.001, weight_decay: 0.0, epochs: 10, min_steps: 0, batch_size: 128,
  num_workers: 1, min_workers: null, resize_every_s: 60.0, num_streams: 24, device: auto, strategy: ddp, offload: false,
  cpus_per_worker: 1.0, activation_checkpointing: false, compile: false, checkpoint_every_steps: 50, max_failures: 3,
  collective_timeout_s: 120, max_nonfinite_steps: 3}
data: {sources: null, root: prepared, max_skipped_fraction: 0.01, num_threads: 2}
statistics: {covariance_eps: 1.0e-07, shrinkage: none}
calibration: {form: published, scale: null, slope: 1.0, bias: null}
evaluate: {routing: image, label_space: task, batch_size: 256, text_grid: 33, skip_weight: 0.0, num_workers: 1,
  cpus_per_worker: 1.0}
schedule: {concurrent_tasks: 1}
cluster: {address: null, num_cpus: null}
telemetry: {port: null, host: 127.0.0.1, linger_s: 0.0, trackers: [], tracking_root: tracking}
protocol: own
""")
"""What the first version stored of a configuration that has a run's name and one task."""
PROMPTS = {"image_depth": 8, "image_length": 8, "text_depth": 8, "text_length": 8}
LOW_RANK = {"rank": 2, "alpha": 1.0, "image_depth": None, "text_depth": None}
FIRST_METHODS: dict[str, dict[str, Any]] = {
    "diki": PROMPTS,
    "zero_shot": {},
    "concat_prompts": PROMPTS,
    "dpw": PROMPTS | {"rank": 64},
    "c_ada": {"image_depth": 12, "text_depth": 12, "rank": 16, "scale": 0.1, "orthogonality": 1.0},
    "sequential_lora": LOW_RANK
    | {"against_forgetting": "none", "wise_ft": 1.0, "ewc_lambda": 1000.0, "badam_std": 0.01},
    "zscl": LOW_RANK
    | {"temperature": 2.0, "weight_consolidation": 1.0, "average_every": 100}
    | {"reference": None, "num_reference": 1024, "reference_batch": 64},
    "rail": {"hidden_dim": 2048, "ridge": 0.1, "fusion": 0.9, "projection_seed": 0},
}
AS_WHAT_THEY_COME_TO = ("tasks", "backbone.", "train.min_steps", "train.device")
"""In keys as the content, the number of epochs and the precision: tests of their own ask that."""


def fields_of(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of everything that can be set below a section; a method's as `method.name`."""
    for name, field in model.model_fields.items():
        sections = list(sections_in(field.annotation))
        for section in sections:
            yield from fields_of(section, f"{path}{name}.")
        if not sections:
            yield f"{path}{name}", field


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from sections_in(part)


def configuration(method: str = "diki") -> Config:
    return parse(TREE | {"method": {"name": method} | FAMILIES[method][0]})


def planned(config: Config) -> Plan:
    """Two made-up data sets, of 1 and of 6 steps an epoch."""
    tasks = []
    for name, num in (("few", 4), ("many", 24)):
        splits = {
            split: Split(
                split,
                (Shard(f"{split}.tar", num, 10240 * num, "ab" * 32, tuple(range(4, 4 + num)), (1,) * num),),
                (num // 2, num - num // 2),
            )
            for split in ("train", "val", "test")
        }
        classes, templates = ("cat", name), ("a photo of a {}.", "the {}.")
        index = DatasetIndex(name, name, classes, templates, "own", splits, {})
        tasks.append(PlannedTask(name, index, index.templates, 0, 0, "", None))
    return Plan(config, "cd" * 32, 64, tuple(tasks)).in_order([0, 1])


def keys(config: Config) -> list[str]:
    return [task.key for task in planned(config).tasks]


def question(config: Config) -> str:
    sweep = SweepConfig.model_validate({"name": "s", "base": "x"})
    return question_of(sweep, planned(config), {"given": [0, 1]})


def with_another(config: Config, path: str) -> Config:
    """The configuration with another value of one field, without asking whether it goes with the other fields."""
    *sections, name = path.split(".")
    section = getattr(config, sections[0]) if sections else config
    if isinstance(section, tuple):
        return config.model_copy(update={sections[0]: (_changed(section[0], name), *section[1:])})
    return config.model_copy(update={sections[0]: _changed(section, name)}) if sections else _changed(config, name)


def _changed(section: Any, name: str) -> Any:
    value, annotation = getattr(section, name), type(section).model_fields[name].annotation
    options = [o for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal for o in get_args(part)]
    if options:
        other: Any = next((o for o in options if o != value), "another")
    elif isinstance(value, bool):
        other = not value
    else:
        other = value / 2 + 0.3 if isinstance(value, float) else value + 1 if isinstance(value, int) else "another"
    return section.model_copy(update={name: other})


EVERY_FIELD = [("diki", path, field) for path, field in fields_of(Config) if not path.startswith("method.")] + [
    (method, f"method.{name}", field)
    for method, section in METHOD_SECTIONS.items()
    for name, field in section.model_fields.items()
]


def fields_that_change(which: Affects) -> dict[str, Any]:
    rows = [(method, path) for method, path, field in EVERY_FIELD if affects(field) is which]
    return {"argvalues": rows, "ids": [f"{method}:{path}" for method, path in rows]}


def test_every_field_says_what_it_affects() -> None:
    assert len(EVERY_FIELD) > 90
    assert [f"{method}: {path}" for method, path, field in EVERY_FIELD if affects(field) is None] == []


def test_a_new_field_that_does_not_say_it_is_an_error() -> None:
    class Said(Section):
        rank: ChangesModule[int] = 1

    class Unsaid(Said):
        speed: int = 1

    assert settings(Said(), Affects.MODULE) == {"rank": 1}
    with pytest.raises(TypeError, match=r"Unsaid\.speed does not say what it affects: write its type as ChangesModule"):
        settings(Unsaid(), Affects.MODULE)


@pytest.mark.parametrize(("method", "path"), **fields_that_change(Affects.NOTHING))
def test_what_changes_nothing_is_in_no_digest_key_lease_or_question(method: str, path: str) -> None:
    config = configuration(method)
    if path == "train.num_workers":  # without num_parts it says that, too, until a run remembers it
        config = config.model_copy(update={"train": config.train.model_copy(update={"num_parts": config.train.parts})})
    other = with_another(config, path)
    assert other != config
    assert other.digest() == config.digest()
    assert keys(other) == keys(config)
    assert lease_of(planned(other)) == lease_of(planned(config))
    assert question(other) == question(config)


@pytest.mark.parametrize(("method", "path"), **fields_that_change(Affects.ANSWER))
def test_what_changes_answers_is_in_digest_and_question_and_in_no_key_or_lease(method: str, path: str) -> None:
    config = configuration(method)
    other = with_another(config, path)
    assert other.digest() != config.digest()
    assert question(other) != question(config)
    assert keys(other) == keys(config)
    assert lease_of(planned(other)) == lease_of(planned(config))


@pytest.mark.parametrize(("method", "path"), **fields_that_change(Affects.MODULE))
def test_what_changes_modules_is_in_digest_question_key_and_lease(method: str, path: str) -> None:
    config = configuration(method)
    config = config.model_copy(update={"train": config.train.model_copy(update={"min_steps": 0})})
    other = with_another(config, path)
    assert other.digest() != config.digest()
    if path in ("method.name", "method.reference"):  # there is no other method or data set of that name to plan with
        return
    assert question(other) != question(config)
    if path.startswith(AS_WHAT_THEY_COME_TO):
        return
    assert not set(keys(other)) & set(keys(config))
    assert lease_of(planned(other)) != lease_of(planned(config))


@pytest.mark.parametrize("method", FAMILIES)
def test_keys_are_those_of_the_first_version(method: str) -> None:
    """A key that changes trains every stored module of the method anew."""
    assert keys(configuration(method)) == list(FAMILIES[method][1:])


def test_every_method_has_a_key_that_is_known() -> None:
    assert set(FAMILIES) == set(METHOD_SECTIONS)


def test_keys_know_the_fewest_steps_as_the_epochs_they_come_to() -> None:
    """Of the two data sets one has a step an epoch, the other six; both have at least two epochs."""

    def asking(min_steps: int) -> Config:
        return parse(TREE | {"train": TREE["train"] | {"min_steps": min_steps}})  # type: ignore[operator]

    few, many = keys(asking(10))
    assert keys(asking(9))[0] != few
    assert keys(asking(12))[0] != few
    assert keys(asking(12))[1] == keys(asking(0))[1] == many
    assert keys(asking(13))[1] != many
    assert lease_of(planned(asking(9))) != lease_of(planned(asking(10)))


def test_keys_and_leases_know_the_device_as_the_precision_it_comes_to() -> None:
    def computing(device: str, precision: str) -> Config:
        return parse(TREE | {"train": TREE["train"] | {"device": device}, "backbone": {"precision": precision}})  # type: ignore[operator]

    for of in (keys, lambda config: [lease_of(planned(config))]):
        exact, rounded = of(computing("cpu", "float32")), of(computing("cpu", "bfloat16"))
        assert not set(exact) & set(rounded)
        assert exact == of(computing("cuda", "float32")) == of(computing("cpu", "auto"))
        assert rounded == of(computing("cuda", "bfloat16")) == of(computing("cuda", "auto"))


def test_keys_know_what_tasks_and_backbone_hold_and_not_how_they_are_called() -> None:
    plan = planned(configuration())
    few, splits = plan.tasks[0], plan.tasks[0].index.splits

    def key(backbone: str = plan.backbone_digest, **changed: Any) -> str:
        return replace(plan, backbone_digest=backbone, tasks=(replace(few, **changed),)).in_order([0]).tasks[0].key

    def other_bytes(split: str) -> DatasetIndex:
        (shard,) = splits[split].shards
        other = replace(splits[split], shards=(replace(shard, sha256="12" * 32),))
        return replace(few.index, splits={**splits, split: other})

    assert key() == key(name="another", templates=few.templates[:1]) == few.key  # the first template trains
    assert key(index=replace(few.index, name="another", uri="elsewhere")) == few.key
    assert key(index=other_bytes("test")) == few.key
    for other in (
        key("ef" * 32),
        key(templates=few.templates[::-1]),
        key(index=replace(few.index, class_names=("cat", "other"))),
        key(index=other_bytes("train")),
        key(index=other_bytes("val")),
    ):
        assert other != few.key
    assert lease_of(replace(plan, backbone_digest="ef" * 32)) != lease_of(plan)


def test_keys_and_leases_know_what_reference_data_hold_and_not_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration("zscl")
    elsewhere = with_another(config, "method.reference")
    assert elsewhere.method.reference == "another"  # type: ignore[union-attr]
    monkeypatch.setattr(plans, "reference_digest", lambda config: "content")
    assert keys(elsewhere) == keys(config)
    assert lease_of(planned(elsewhere)) == lease_of(planned(config))
    here = keys(config)
    monkeypatch.setattr(plans, "reference_digest", lambda config: "other content")
    assert not set(keys(config)) & set(here)


@pytest.mark.parametrize("method", FIRST_METHODS)
def test_no_default_is_another_than_that_of_the_first_version(method: str) -> None:
    """Digests leave out what has its default. One that changes would take results of the old default for those of the
    new: put a version into `Config.digest` then, and change the value here. New fields need nothing here."""
    stored = parse(FIRST | {"method": {"name": method} | FIRST_METHODS[method]})
    short = parse({"run": {"name": "r"}, "tasks": [{"data": "a"}], "method": {"name": method}})
    assert stored.digest() == short.digest()


def test_results_of_the_first_version_are_known_by_their_configuration() -> None:
    """Their digest is of another sum of settings, with the number of evaluation workers for one."""
    results = {"config": FIRST | {"method": {"name": "diki"} | PROMPTS}, "config_digest": "of the first version"}
    short = {"run": {"name": "r"}, "tasks": [{"data": "a"}]}
    assert not is_of_configuration(results, parse(short))  # routed by class densities now
    short["routing"] = {"density": "task"}
    assert is_of_configuration(results, parse(short | {"evaluate": {"num_workers": 4}}))
    assert not is_of_configuration(results, parse(short | {"evaluate": {"routing": "batch"}}))
    assert not is_of_configuration(results, parse(short | {"train": {"lr": 1.0}}))
    assert not is_of_configuration({"config": short | {"gone": 1}}, parse(short))
