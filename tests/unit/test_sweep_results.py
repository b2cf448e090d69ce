"""What a sweep keeps of its settings, and which of it a changed sweep still sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from diki_ray.config.sweep import SweepConfig
from diki_ray.runs.sweep.results import SweepResults

VALUES = [{"transfer": 0.2, "average": 0.4, "last": 0.9, "order": "given", "seed": 0}]


def sweep(**fields: object) -> SweepConfig:
    return SweepConfig.model_validate({"name": "s", "base": "x", "parameters": {"z": [1, 2], "a": ["x"]}} | fields)


def test_results_are_in_the_sweeps_order_and_under_its_question(tmp_path: Path) -> None:
    results = SweepResults(str(tmp_path), "s", "question")
    results.record({"z": 2, "a": "x"}, validation={"values": VALUES})
    results.record({"z": 1, "a": "x"}, error="it broke")
    trials = results.trials(sweep())
    assert [list(t["setting"].items()) for t in trials] == [[("z", 1), ("a", "x")], [("z", 2), ("a", "x")]]
    assert [t["error"] for t in trials] == ["it broke", None]
    assert [t["num_tried"] for t in trials] == [0, 1]
    assert trials[1]["validation"]["objective"]["mean"] == 0.5
    other_weights = sweep(objective={"transfer": 0, "average": 0})
    assert results.trials(other_weights)[1]["validation"]["objective"]["mean"] == 0.9
    assert [t["setting"]["z"] for t in results.trials(sweep(parameters={"z": [2], "a": ["x", "y"]}))] == [2]
    assert results.trials(sweep(parameters={"z": [1, 2]})) == []
    assert SweepResults(str(tmp_path), "s", "of other data").trials(sweep()) == []
    optuna = results.trials(sweep(search="optuna", parameters={"z": {"low": 0, "high": 3}, "a": ["x"]}))
    assert [t["setting"]["z"] for t in optuna] == [2, 1]  # as they were found


def test_results_of_cases_are_found_again(tmp_path: Path) -> None:
    cases = [{"method": {"name": "rail", "hidden_dim": 8}, "z": 1}, {"method": {"name": "diki"}}]
    results = SweepResults(str(tmp_path), "s", "q")
    for case in reversed(cases):
        results.record(case | {"a": "x"}, validation={"values": VALUES})
    trials = results.trials(sweep(cases=cases, parameters={"a": ["x"]}))
    assert [list(t["setting"].items()) for t in trials] == [list((case | {"a": "x"}).items()) for case in cases]


def test_a_setting_that_failed_and_then_ran_has_a_result(tmp_path: Path) -> None:
    results = SweepResults(str(tmp_path), "s", "q")
    results.record({"z": 1, "a": "x"}, error="it broke")
    results.record({"z": 1, "a": "x"}, stopped_at_epoch=1.5)
    (trial,) = results.trials(sweep())
    assert (trial["error"], trial["stopped_at_epoch"], trial["num_tried"]) == (None, 1.5, 1)


@pytest.mark.parametrize("later", [{"stopped_at_epoch": 1.0}, {"error": "it broke"}])
def test_a_result_outlives_a_second_draw_of_its_setting(tmp_path: Path, later: dict) -> None:
    results = SweepResults(str(tmp_path), "s", "q")
    results.record({"z": 1, "a": "x"}, validation={"values": VALUES})
    results.record({"z": 1, "a": "x"}, **later)
    (trial,) = results.trials(sweep())
    assert (trial["error"], trial["stopped_at_epoch"], trial["num_tried"]) == (None, None, 2)
    assert trial["validation"]["objective"]["mean"] == 0.5
