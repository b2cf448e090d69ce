"""Every error that a configuration can have, one by one, and what it says; overrides, digest, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diki_ray.config import Config, load, parse
from diki_ray.config.methods import METHOD_SECTIONS
from diki_ray.errors import ConfigError, UserError
from diki_ray.learning.methods import METHODS

GOOD = {"run": {"name": "r"}, "tasks": [{"data": "embedded:digits"}]}


def changed(**sections: object) -> dict:
    return GOOD | sections


def replayed(**settings: object) -> dict:
    return changed(method={"name": "sequential_lora", "replay": settings})


TABLE = [
    ("unknown section", changed(trian={}), r"trian: there is no such field; there are backbone, .* train"),
    ("unknown key", changed(train={"epoch": 3}), r"train\.epoch: there is no such field; there are activation_ch"),
    ("unknown key in a task", changed(tasks=[{"data": "x", "class_names": []}]), r"tasks\.0\.class_names: there is no"),
    ("wrong type", changed(train={"epochs": "three"}), r"train\.epochs: .*integer.*'three'"),
    ("out of range", changed(train={"lr": -1}), r"train\.lr: .*greater than 0.*-1"),
    ("not one of", changed(evaluate={"routing": "majority"}), r"evaluate\.routing: .*'image' or 'batch'.*'majority'"),
    ("infinite", changed(train={"lr": float("inf")}), r"train\.lr: .*finite"),
    ("missing section", {"tasks": GOOD["tasks"]}, r"run: this field is needed"),
    ("missing field", changed(tasks=[{"name": "a"}]), r"tasks\.0\.data: this field is needed"),
    ("no tasks", changed(tasks=[]), r"tasks: there are none"),
    ("unknown protocol", changed(tasks=[], protocol="mtil-9/coop"), r"no protocol 'mtil-9'; known are mtil-1"),
    ("protocol without split", changed(tasks=[], protocol="mtil-1"), r"write NAME/coop or NAME/zscl"),
    ("protocol and tasks", changed(protocol="mtil-1/coop"), r"leave tasks out, and set data\.sources"),
    (
        "protocol in another label space",
        changed(tasks=[], protocol="xtail-1/coop", data={"sources": "/d"}),
        r"evaluate\.label_space=all",
    ),
    (
        "two tasks of one name",
        changed(tasks=[{"data": "a", "name": "x"}, {"data": "b", "name": "x"}]),
        r"two tasks are",
    ),
    ("template without a place", changed(tasks=[{"data": "a", "template": "a photo."}]), r"exactly one \{\}"),
    ("name with a slash", changed(run={"name": "a/b"}), r"run\.name: .*pattern"),
    ("more workers than streams", changed(train={"num_workers": 30}), r"num_workers=30 is more than num_streams=24"),
    ("decay without adamw", changed(train={"weight_decay": 0.1}), r"weight_decay is for optimizer=adamw"),
    ("nothing to train", changed(method={"image_depth": 0, "text_depth": 0}), r"there would be nothing to train"),
    (
        "unknown method",
        changed(method={"name": "dikki"}),
        r"^configuration: method\.name: there is no method 'dikki'; .*diki",
    ),
    (
        "a setting of another method",
        changed(method={"name": "zero_shot", "image_depth": 2}),
        r"^configuration: method\.image_depth: there is no such field; there are name$",
    ),
    ("a method's wrong setting", changed(method={"text_depth": -1}), r"^configuration: method\.text_depth: .*-1"),
    ("no method at all", changed(method=3), r"method\.name: there is no method 3"),
    (
        "a choice among images of a reservoir",
        replayed(score="reservoir", choice="top"),
        r"method\.replay: a reservoir is drawn, and not chosen by scores; leave choice out",
    ),
    ("a memory of nothing", replayed(num_images=0), r"method\.replay\.num_images"),
    ("no such score", replayed(score="luck"), r"method\.replay\.score: .*'bregman'.*'luck'"),
    ("replay without factors", changed(method={"name": "diki", "replay": {}}), r"method\.replay: there is no such"),
    ("a grid of one point", changed(evaluate={"text_grid": 1}), r"1 point is no grid"),
    ("port out of range", changed(telemetry={"port": 70000}), r"telemetry\.port: .*65535"),
    ("not a tree", ["a"], r"configuration: "),
]


@pytest.mark.parametrize(("tree", "says"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_wrong_is_said_with_field_value_and_what_is_allowed(tree: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(tree)


def test_one_bad_field_is_one_sentence() -> None:
    with pytest.raises(ConfigError) as error:
        parse(changed(tasks=[{"data": "x", "tamplate": "a {}"}]))
    assert "at least 1 item" not in str(error.value)


def test_files_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    config = load(path, ["train.epochs=3", "run.name=other", "backbone.pretrained=null", "train.epochs=4"])
    assert (config.train.epochs, config.run.name) == (4, "other")
    for overrides, says in [
        (["train.epochs"], "is not an override"),
        (["--verbose"], "is not an override"),
        (["train.epochs.x=3"], "train.epochs"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load(path, overrides)
    path.write_text("run: [unclosed")
    with pytest.raises(ConfigError, match="is not a valid configuration"):
        load(path)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_resolved_tree_comes_back_and_digest_is_of_what_decides_the_numbers() -> None:
    config = parse(changed(train={"epochs": 3}))
    assert parse(yaml.safe_load(config.to_yaml())) == config
    elsewhere = parse(changed(train={"epochs": 3}, run={"name": "q", "storage": "s3://b"}, telemetry={"port": 9000}))
    assert elsewhere.digest() == config.digest()
    assert parse(changed(train={"epochs": 4})).digest() != config.digest()
    assert parse(changed(calibration={"bias": 0.0}, train={"epochs": 3})).digest() != config.digest()


def test_every_field_that_is_not_plain_has_a_docstring_or_comment() -> None:
    """The reference in docs/ is made from the types: sections must say what they are."""
    sections = [field.annotation for name, field in Config.model_fields.items() if name != "method"]
    for section in [*sections, *METHOD_SECTIONS.values()]:
        assert getattr(section, "__doc__", None), section


def test_every_method_has_a_section_and_every_section_a_method() -> None:
    assert set(METHOD_SECTIONS) == set(METHODS)


PLAN_ERRORS = [
    ("no such embedded task", ["tasks.0.data=embedded:nonsense"], "nonsense"),
    ("missing folder", ["tasks.0.data=/no/such/folder"], "/no/such/folder"),
    ("unknown backbone", ["backbone.name=ViT-Z"], "neither `embedded`, nor a Python file"),
    ("missing backbone file", ["backbone.name=/no/such.py"], "there is no file"),
    ("too deep", ["method.image_depth=99"], "method.image_depth: 99 blocks"),
]


@pytest.mark.parametrize(("overrides", "says"), [row[1:] for row in PLAN_ERRORS], ids=[row[0] for row in PLAN_ERRORS])
def test_what_cannot_be_planned_is_said_before_any_cluster_is_touched(
    tmp_path: Path, overrides: list[str], says: str
) -> None:
    from diki_ray.runs.plan import load_backbone, make_plan

    debug = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"
    tree = yaml.safe_load(debug.read_text())
    tree["tasks"] = tree["tasks"][:1]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    lines = [o.replace("tasks.0.data=", "tasks=[{data: ") + "}]" if o.startswith("tasks.0") else o for o in overrides]
    config = load(path, [*lines, f"data.root={tmp_path}"])

    def planned() -> object:
        return make_plan(config, load_backbone(config))

    with pytest.raises(UserError, match=says):
        planned()


def test_a_folder_without_class_names_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    from diki_ray.runs.plan import load_backbone, make_plan

    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    config = parse(changed(tasks=[{"data": str(tmp_path / "flat")}], data={"root": str(tmp_path / "prepared")},
                           method={"image_depth": 1, "text_depth": 1}))  # fmt: skip
    with pytest.raises(UserError, match="no images in class folders: expected <class>/<image>"):
        make_plan(config, load_backbone(config))


def test_how_fast_it_runs_is_not_part_of_what_decides_the_numbers() -> None:
    assert parse(changed(train={"compile": True})).digest() == parse(changed()).digest()
