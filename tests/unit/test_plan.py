"""Plans are values: what a module's key depends on, what is pending, who trains what side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from diki_ray.config import Config, load
from diki_ray.config.places import with_absolute_paths
from diki_ray.errors import ConfigError, DataError
from diki_ray.learning.methods import METHODS, Diki
from diki_ray.runs.continual import _named_shortly, run_continual
from diki_ray.runs.plan import Plan, find_data, load_backbone, make_plan, plan_of
from diki_ray.runs.train.group import shared_out

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"
BACKBONE = load_backbone(load(DEBUG))


def planned(prepared: Path, *overrides: str, order: tuple[int, ...] = (0, 1)) -> Plan:
    tree = load(DEBUG, [f"data.root={prepared}", *overrides]).model_dump()
    tree["tasks"] = [tree["tasks"][t] for t in order]
    return make_plan(Config.model_validate(tree), BACKBONE)


def keys(plan: Plan) -> dict[str, str]:
    return {task.name: task.key for task in plan.tasks}


def test_a_key_depends_on_the_task_and_the_recipe_and_not_on_the_stream(prepared: Path) -> None:
    plan = planned(prepared)
    assert keys(planned(prepared, order=(1, 0))) == keys(plan)
    assert keys(planned(prepared, "calibration.bias=2", "evaluate.routing=batch", "run.name=q")) == keys(plan)
    for change in ("train.epochs=2", "run.seed=1", "train.num_workers=2", "method.text_length=3", "train.lr=1"):
        assert not set(keys(planned(prepared, change)).values()) & set(keys(plan).values()), change


def test_data_by_their_name_are_the_same_module(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    tree = load(DEBUG, [f"data.root={tmp_path}"]).model_dump()
    tree["tasks"] = [
        task | {"data": f"{tmp_path}/{name}"} for task, name in zip(tree["tasks"], keys(plan), strict=True)
    ]
    named = Config.model_validate(tree)
    assert keys(make_plan(named, BACKBONE)) == keys(plan)
    pairs = [(section, task.index) for section, task in zip(named.tasks, plan.tasks, strict=True)]
    assert [_named_shortly(*pair) for pair in pairs] == [True, True]
    assert [_named_shortly(*pair) for pair in find_data(plan.config)] == [False, False]


def test_depths_that_nobody_wrote_down_fit_the_backbone_and_others_are_refused(prepared: Path) -> None:
    tree = load(DEBUG, [f"data.root={prepared}"]).model_dump()
    plan = make_plan(Config.model_validate(tree | {"method": {"name": "diki"}}), BACKBONE)
    depths = [tower.num_blocks for tower in BACKBONE.towers]
    assert [plan.config.method.image_depth, plan.config.method.text_depth] == depths  # type: ignore[union-attr]
    written = make_plan(
        Config.model_validate(tree | {"method": {"image_depth": depths[0], "text_depth": depths[1]}}), BACKBONE
    )
    assert keys(written) == keys(plan)
    with pytest.raises(ConfigError, match="image_depth: 8 blocks were asked for"):
        make_plan(Config.model_validate(tree | {"method": {"name": "diki", "image_depth": 8}}), BACKBONE)


def test_a_task_of_few_steps_is_trained_for_more_epochs(prepared: Path) -> None:
    plan = planned(prepared, "train.epochs=2", "train.batch_size=16")  # 40 images: 3 steps an epoch
    assert [t.num_epochs for t in plan.tasks] == [2, 2]
    longer = planned(prepared, "train.epochs=2", "train.batch_size=16", "train.min_steps=10")
    assert [t.num_epochs for t in longer.tasks] == [4, 4]
    # What is trained alike is one module, however its length was asked for.
    assert keys(longer) == keys(planned(prepared, "train.epochs=4", "train.batch_size=16"))
    assert keys(plan) == keys(planned(prepared, "train.epochs=2", "train.batch_size=16", "train.min_steps=6"))


def test_all_missing_data_is_named_and_nothing_is_prepared(tmp_path: Path) -> None:
    tree = load(DEBUG, [f"data.root={tmp_path}/prepared"]).model_dump()
    tree["tasks"] += ({"data": str(tmp_path / "a")}, {"data": str(tmp_path / "b")})
    with pytest.raises(DataError, match=r"(?s)/a'.*/b'"):
        make_plan(Config.model_validate(tree), BACKBONE)
    assert not (tmp_path / "prepared").exists()


def test_data_is_looked_for_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backbone whose weights would be fetched: neither they nor a cluster are touched where data is missing."""
    config = load(DEBUG, [f"run.storage={tmp_path}/s", f"tasks=[{{data: {tmp_path}/none}}]", "backbone.name=ViT-B-16"])
    loaded = list[str]()
    monkeypatch.setattr("diki_ray.clip.backbone.load", lambda name, *rest: loaded.append(name) or BACKBONE)
    with pytest.raises(DataError, match="none"):
        run_continual(config, Console(quiet=True))
    assert loaded == []
    there = load(DEBUG, [f"data.root={tmp_path}/prepared", "tasks=[{data: embedded:digits}]", "backbone.name=ViT-B-16"])
    assert [task.name for task in plan_of(there).tasks] == ["digits"]
    assert loaded == ["ViT-B-16"]


def test_local_paths_are_made_absolute_and_nothing_else(tmp_path: Path) -> None:
    """Workers run in folders of their own: a path that stays relative is not found there."""
    (tmp_path / "weights.pt").touch()

    def located(*overrides: str) -> Config:
        return with_absolute_paths(load(DEBUG, overrides), str(tmp_path))

    for name, expected in (
        ("clip.py", f"{tmp_path}/clip.py"),
        ("local-dir:models/clip", f"local-dir:{tmp_path}/models/clip"),
        ("local-dir:/models/clip", "local-dir:/models/clip"),
        ("ViT-B-16", "ViT-B-16"),
    ):
        assert located(f"backbone.name={name}").backbone.name == expected
    assert located("backbone.pretrained=weights.pt").backbone.pretrained == f"{tmp_path}/weights.pt"
    assert located("backbone.pretrained=openai").backbone.pretrained == "openai"
    assert located("data.root=s3://b/prepared").data.root == "s3://b/prepared"
    assert located("run.storage=~/runs").run.storage == str(Path.home() / "runs")
    zscl = load(DEBUG).model_dump() | {"method": {"name": "zscl", "reference": "stamps"}}
    method = with_absolute_paths(Config.model_validate(zscl), str(tmp_path)).method
    assert method.model_dump()["reference"] == f"{tmp_path}/stamps"
    config = located()
    assert [t.data for t in config.tasks] == [t.data for t in load(DEBUG).tasks]  # embedded:NAME
    assert with_absolute_paths(config) == config


def test_settings_that_only_answer_are_in_no_key(prepared: Path) -> None:
    def rail(**settings: float) -> dict[str, str]:
        tree = planned(prepared).config.model_dump() | {"method": {"name": "rail", "hidden_dim": 8} | settings}
        return keys(make_plan(Config.model_validate(tree), BACKBONE))

    assert rail(ridge=3.0, fusion=0.5) == rail()
    assert not set(rail(projection_seed=1).values()) & set(rail().values())


def test_seeds_come_from_the_data_and_not_from_the_position(prepared: Path) -> None:
    seeds = {t.name: t.seed for t in planned(prepared).tasks}
    assert {t.name: t.seed for t in planned(prepared, order=(1, 0)).tasks} == seeds
    assert len(set(seeds.values())) == 2


def test_fewer_images_than_dimensions_are_said_where_a_gaussian_routes_unshrunk(prepared: Path) -> None:
    unshrunk = ("routing.density=task", "statistics.shrinkage=none")
    sentence = planned(prepared, *unshrunk).few_images()  # 40 images, 64 dimensions
    assert sentence is not None
    assert "digits, gems" in sentence
    assert "statistics.shrinkage=oas" in sentence
    assert planned(prepared, "routing.density=task").few_images() is None
    assert planned(prepared, "routing.density=classes", "statistics.shrinkage=none").few_images() is None
    tree = planned(prepared, *unshrunk).config.model_dump() | {"method": {"name": "rail"}}
    assert make_plan(Config.model_validate(tree), BACKBONE).few_images() is None  # no Gaussian routes there
    tasks = "tasks=[{data: 'embedded:digits', shots: 7}]"  # 70
    tree = load(DEBUG, [f"data.root={prepared}", *unshrunk, tasks])
    assert make_plan(tree, BACKBONE).few_images() is None


def test_pending_is_what_is_not_committed(prepared: Path) -> None:
    plan = planned(prepared)
    first, second = plan.tasks
    assert plan.pending({first.key}) == [second]
    assert plan.pending({first.key, second.key}) == []


def test_a_method_whose_tasks_build_on_each_other_has_the_predecessor_in_its_keys(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sequential(Diki):
        sequential = True

    monkeypatch.setitem(METHODS, "diki", Sequential)
    plan, swapped = planned(prepared), planned(prepared, order=(1, 0))
    assert plan.tasks[0].predecessor is None
    assert plan.tasks[1].predecessor == plan.tasks[0].key
    assert not set(keys(plan).values()) & set(keys(swapped).values())
    assert shared_out(plan.tasks, 2) == [list(plan.tasks)]  # they cannot be trained side by side


def test_independent_tasks_are_shared_out_by_their_size(prepared: Path) -> None:
    tasks = planned(prepared).tasks
    assert shared_out(tasks, 1) == [list(tasks)]
    groups = shared_out(tasks, 5)
    assert sorted(t.name for g in groups for t in g) == ["digits", "gems"]
    assert len(groups) == 2


def test_workers_in_other_folders_find_the_data(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    plan = make_plan(load(DEBUG, ["data.root=here"]), BACKBONE)
    assert all(Path(task.index.uri).is_absolute() for task in plan.tasks)
