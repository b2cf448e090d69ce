"""`continual --plan`: what a run would do, from its data and its storage, with nothing started and nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learning import store_run

from diki_ray.commands.app import run
from diki_ray.commands.continual import lines
from diki_ray.commands.output import about, size
from diki_ray.config import Config, load
from diki_ray.data.difference import Difference
from diki_ray.runs import forecast as forecasts
from diki_ray.runs.forecast import Forecast, forecast
from diki_ray.runs.plan import Former, Plan, load_backbone, make_plan
from diki_ray.runs.speed import Speed, measured
from diki_ray.store.run_store import RunStore

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"
BACKBONE = load_backbone(load(DEBUG))
SPEED = Speed(frozen_image_s=0.01, step_image_s=0.03, step_class_s=0.02)


@pytest.fixture
def config(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two tasks of 40 images of ten classes, and a machine whose speed is known."""
    monkeypatch.setattr(forecasts, "measured", lambda config, method: SPEED)
    monkeypatch.setattr(forecasts, "decoding_s", lambda data, method: 0.002)
    return load(DEBUG, [f"data.root={prepared}", f"run.storage={tmp_path}/storage"])


def states(found: Forecast) -> list[str]:
    return [task.state for task in found.tasks]


def test_each_task_is_learnt_taken_from_the_library_or_to_learn(config: Config, tmp_path: Path) -> None:
    plan = make_plan(config, BACKBONE)  # prepares
    assert states(forecast(config, BACKBONE)) == ["to learn", "to learn"]
    assert not (tmp_path / "storage").exists()
    store_run(config.run.storage, plan, {plan.tasks[1].key: b"a module"}, run="other")
    assert states(forecast(config, BACKBONE)) == ["to learn", "in the library"]
    own = store_run(config.run.storage, plan, {plan.tasks[0].key: b"another"})
    before = sorted(tmp_path.rglob("*"))
    found = forecast(config, BACKBONE)
    assert states(found) == ["learnt", "in the library"]
    assert found.module_bytes == 0
    assert found.evaluates  # there are no results yet
    (tmp_path / "storage" / "library" / "modules" / f"{own.modules()[0].digest}.safetensors").write_bytes(b"damaged")
    assert states(forecast(config, BACKBONE)) == ["to learn", "in the library"]
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_are_not_prepared_stay_so(config: Config, tmp_path: Path) -> None:
    found = forecast(
        config.model_copy(update={"data": config.data.model_copy(update={"root": str(tmp_path)})}), BACKBONE
    )
    assert states(found) == ["to prepare and learn", "to prepare and learn"]
    assert [task.num_images["train"] for task in found.tasks] == [40, 40]
    assert [task.num_bytes > 1e6 for task in found.tasks] == [True, True]
    assert list(tmp_path.iterdir()) == []
    assert "nothing was started and nothing was written" in lines(found)


def test_the_time_of_a_task_computed_by_hand(config: Config) -> None:
    make_plan(config, BACKBONE)
    found = forecast(config, BACKBONE)
    read = 0.002 / config.data.num_threads
    steps = 40 * (0.03 + read) + 3 * 10 * 0.02  # one epoch: 40 images, 3 steps with 10 classes
    assert found.tasks[1].learn_s == pytest.approx(steps + 40 * (0.01 + read) + 40 * (0.01 + read))
    assert found.evaluate_s == pytest.approx((697 + 400) * (2 * 0.01 + read))
    assert found.seconds == pytest.approx(
        forecasts.START_S + found.evaluate_s + sum(t.learn_s or 0 for t in found.tasks)
    )


def test_of_data_that_changed_only_the_changed_images_count(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(plan: Plan, store: RunStore) -> Plan:
        first, second = plan.tasks
        change = Difference(first.index, added=np.arange(3), removed=np.arange(1))
        return replace(plan, tasks=(replace(first, former=Former("k", change, True), num_epochs=0), second))

    make_plan(config, BACKBONE)
    monkeypatch.setattr(forecasts, "with_former_modules", kept)
    found = forecast(config, BACKBONE)
    assert found.tasks[0].learn_s == pytest.approx(4 * (0.01 + 0.002 / config.data.num_threads))
    assert any("3 images came and 1 went" in line for line in lines(found))
    assert found.tasks[1].note is None


def test_the_speed_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(DEBUG)
    diki, classes = (
        measured(c, forecasts.build_method(c, BACKBONE))
        for c in (config, load(DEBUG.with_name("quickstart_one_pass.yaml")))
    )
    assert diki is not None
    assert classes is not None
    assert min(diki.step_image_s + diki.step_class_s, diki.frozen_image_s, classes.frozen_image_s) > 0
    assert (classes.step_image_s, classes.step_class_s) == (0, 0)
    gpu = config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert measured(gpu, forecasts.build_method(config, BACKBONE)) is None


def test_the_command_prints_json_and_connects_to_nothing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a cluster was started"))
    arguments = ["continual", "--config", str(DEBUG), f"data.root={config.data.root}", "--storage", f"{tmp_path}/s"]
    assert run(None, [*arguments, "--plan", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in document["tasks"]] == ["digits", "gems"]
    assert run(None, [*arguments, "--plan"]) == 0
    assert "to learn: 2" in capsys.readouterr().out
    assert run(None, [*arguments, "--json"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_times_and_sizes_for_people() -> None:
    assert [about(s) for s in (4.2, 99, 750, 30_000)] == ["4 s", "99 s", "12 min", "8.3 h"]
    assert [size(b) for b in (12, 3_210, 345_678_901, 2e12)] == ["12 bytes", "3.2 KB", "346 MB", "2.0 TB"]
