"""The class model in the places where the platform asks it: as router, beside trained modules, and alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_run import StoredRun, picture

from diki_ray.answering.class_answers import ClassDensities
from diki_ray.answering.class_features import Candidates, Exact
from diki_ray.answering.class_head import WEIGHT_STEPS, ClassRouter
from diki_ray.answering.class_model import LearntClasses, PooledScatter
from diki_ray.answering.configured import answers_by_set, build_predictor
from diki_ray.answering.predictor import Predictor
from diki_ray.config import parse, parse_stored
from diki_ray.config.class_model import ClassModelSection
from diki_ray.errors import ConfigError
from diki_ray.learning.module import TaskModule
from diki_ray.prediction.run_predictor import load_predictor
from diki_ray.runs.plan import build_method

TASKS = ("warm", "cold", "lush")
BY_CLASSES = {"density": "classes"}


def run_of(folder: Path, method: str, **sections: object) -> StoredRun:
    depths = {} if method == "classes" else {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2}
    return StoredRun(folder, *TASKS, method={"name": method} | depths, routing=BY_CLASSES, **sections)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    return run_of(tmp_path_factory.mktemp("alone"), "classes")


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    return run_of(tmp_path_factory.mktemp("beside"), "diki")


def predictor_of(run: StoredRun, order: Sequence[int] = (0, 1, 2)) -> Predictor:
    modules = [TaskModule.from_bytes(run.store.read_module(entry.digest)) for entry in run.store.modules()]
    return build_predictor(run.config, build_method(run.config, run.backbone), [modules[n] for n in order], Exact())


def pixels(run: StoredRun, *tasks: str) -> torch.Tensor:
    return torch.stack([run.backbone.preprocess(picture(t, 100 + n)) for n, t in enumerate(tasks)])


def logits(predictor: Predictor, images: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    frozen = predictor.frozen_features(images)
    routes = predictor.routes(predictor.scores(frozen), "image")
    candidates = [Candidates.of(predictor.backbone, names, ["a {}."])]
    return predictor.answer_logits(predictor.image_features(images, frozen, routes), frozen, routes, candidates)


def test_images_are_routed_to_their_tasks_and_weighed_in_steps(beside: StoredRun) -> None:
    predictor = predictor_of(beside)
    frozen = predictor.frozen_features(pixels(beside, *TASKS))
    assert isinstance(predictor.router, ClassRouter)
    scores = predictor.scores(frozen)
    assert predictor.routes(scores, "image").task.tolist() == [0, 1, 2]
    assert torch.equal(scores.weight * WEIGHT_STEPS, (scores.weight * WEIGHT_STEPS).round())
    assert (scores.weight.diagonal() > 0.5).all()


def test_the_model_alone_answers_with_its_own_logits_and_says_the_task(alone: StoredRun) -> None:
    predictor, images = predictor_of(alone), pixels(alone, *TASKS)
    frozen = predictor.frozen_features(images)
    names = [name for module in predictor.modules for name in module.class_names]
    zero_shot = predictor.zero_shot_logits(frozen, [Candidates.of(predictor.backbone, names, ["a {}."])])
    assert predictor.head is not None
    expected = ClassDensities(predictor.head.models.of([0, 1, 2]), frozen).logits(zero_shot, names)
    assert torch.equal(logits(predictor, images, names), expected)
    answers = load_predictor(alone.storage, "colours", alone.config).answer([picture(t, 100) for t in TASKS])
    assert [answer.task for answer in answers] == list(TASKS)


def test_classes_of_the_users_own_are_answered_by_zero_shot_bit_for_bit(alone: StoredRun) -> None:
    predictor, images, names = predictor_of(alone), pixels(alone, *TASKS), ["a car", "a house"]
    frozen = predictor.frozen_features(images)
    zero_shot = predictor.zero_shot_logits(frozen, [Candidates.of(predictor.backbone, names, ["a {}."])])
    assert torch.equal(logits(predictor, images, names), zero_shot)


def test_beside_a_module_the_answer_is_the_weighted_mean_of_both(beside: StoredRun) -> None:
    predictor, images, names = predictor_of(beside), pixels(beside, *TASKS), ["red", "blue", "moss", "fern"]
    both, head = logits(predictor, images, names), predictor.head
    assert head is not None
    predictor.head = None
    own = logits(predictor, images, names)
    frozen = predictor.frozen_features(images)
    zero_shot = predictor.zero_shot_logits(frozen, [Candidates.of(predictor.backbone, names, ["a {}."])])
    weight = beside.config.class_model.beside_modules
    scores = ClassDensities(head.models.of([0, 1, 2]), frozen).logits(zero_shot, names)
    torch.testing.assert_close(both, (own + weight * scores) / (1 + weight))
    assert not torch.allclose(own, zero_shot)  # the modules do say something


@pytest.mark.parametrize("which", ["alone", "beside"])
def test_the_order_of_learning_changes_no_bit(which: str, request: pytest.FixtureRequest) -> None:
    run: StoredRun = request.getfixturevalue(which)
    images, names = pixels(run, *TASKS, "grey"), ["red", "blue", "navy_blue", "moss", "a stranger"]
    expected = logits(predictor_of(run), images, names)
    for order in ((2, 1, 0), (1, 2, 0)):
        assert torch.equal(logits(predictor_of(run, order), images, names), expected)


def test_a_task_more_is_added_to_the_model_that_answered_before(
    beside: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [TaskModule.from_bytes(beside.store.read_module(entry.digest)) for entry in beside.store.modules()]
    images, names, method = pixels(beside, *TASKS), ["red", "moss"], build_method(beside.config, beside.backbone)
    former = build_predictor(beside.config, method, modules[:2], Exact())
    logits(former, images, names)
    expected, scatters, of = logits(predictor_of(beside), images, names), list[str](), PooledScatter.of

    def counted(task: LearntClasses, constants: ClassModelSection) -> PooledScatter:
        scatters.append(task.key)
        return of(task, constants)

    monkeypatch.setattr(PooledScatter, "of", counted)
    grown = build_predictor(beside.config, method, modules, Exact(), former=former)
    assert torch.equal(logits(grown, images, names), expected)
    assert scatters == [modules[2].key]  # those of the others were not read again
    # Learnt anew, a task may have the key it had and other sums.
    changed = [replace(modules[0], statistics=modules[2].statistics), modules[1]]
    afresh = build_predictor(beside.config, method, changed, Exact())
    again = build_predictor(beside.config, method, changed, Exact(), former=former)
    assert torch.equal(logits(again, images, names), logits(afresh, images, names))


def test_a_removed_task_leaves_the_bits_of_a_stream_that_never_had_it(tmp_path: Path, alone: StoredRun) -> None:
    images, names = pixels(alone, *TASKS), ["red", "blue", "moss"]
    never = StoredRun(tmp_path, "warm", "lush", method={"name": "classes"}, routing=BY_CLASSES)
    assert torch.equal(
        logits(predictor_of(alone, (0, 2)), images, names), logits(predictor_of(never, (0, 1)), images, names)
    )


def test_a_module_of_a_former_version_is_a_sentence_and_answers_as_it_did(tmp_path: Path) -> None:
    run = StoredRun(tmp_path, "warm", "cold")
    for entry in run.store.modules():
        module = TaskModule.from_bytes(run.store.read_module(entry.digest))
        former = TaskModule(**{**vars(module), "statistics": None, "key": module.key[::-1].replace("0", "a")})
        run.store.commit_module(run.epoch, former.key, former.task, former.to_bytes())
    former_config = run.config.model_dump(mode="json")
    del former_config["routing"]
    assert parse_stored(former_config, "stored").routing.density == "task"
    assert load_predictor(run.storage, "colours", parse_stored(former_config, "stored")).tasks == ("warm", "cold")
    with pytest.raises(ConfigError, match=r"task 'warm' has no class means.*routing\.density=task"):
        load_predictor(run.storage, "colours", parse(former_config))


@pytest.mark.parametrize(
    ("method", "density", "beside", "expected"),
    [
        ("classes", "classes", 1.0, True),
        ("diki", "classes", 1.0, True),
        ("diki", "classes", 0.0, False),
        ("diki", "task", 1.0, False),
        ("rail", "task", 1.0, True),
        ("zero_shot", "classes", 1.0, False),
    ],
)
def test_what_depends_on_the_whole_set_learnt_is_known(
    method: str, density: str, beside: float, expected: bool
) -> None:
    tree = {"run": {"name": "r"}, "tasks": [{"data": "embedded:digits"}], "method": {"name": method}}
    config = parse(tree | {"routing": {"density": density}, "class_model": {"beside_modules": beside}})
    assert answers_by_set(config) is expected


def test_the_model_alone_routes_by_itself() -> None:
    tree = {"run": {"name": "r"}, "tasks": [{"data": "embedded:digits"}], "method": {"name": "classes"}}
    with pytest.raises(ConfigError, match=r"leave routing\.density=task out"):
        parse(tree | {"routing": {"density": "task"}})


def test_features_that_are_not_finite_are_refused(alone: StoredRun) -> None:
    from diki_ray.errors import DataError

    broken = np.full((1, alone.backbone.embed_dim), np.nan, np.float32)
    with pytest.raises(DataError, match="not finite"):
        predictor_of(alone).scores(torch.from_numpy(broken))
