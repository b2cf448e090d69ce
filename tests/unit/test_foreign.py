"""The authors' released checkpoints in a store: a file of their layout, built from the golden tensors, predicts what
their code predicted; a file that is anything else is refused with a sentence and nothing in it runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import Golden

from diki_ray.answering.predictor import Predictor
from diki_ray.config import Config, parse
from diki_ray.errors import ConfigError, DataError, UserError
from diki_ray.prediction.run_predictor import RunPredictor, load_predictor
from diki_ray.runs.import_checkpoint import NOMINAL_COUNT, NamedTask, import_checkpoint, read_checkpoint
from diki_ray.runs.stored_run import config_of
from diki_ray.store.run_store import RunStore

GOLDEN = Golden.load()
T = GOLDEN.num_tasks
ROOT = Path(__file__).parent.parent.parent
TASKS = tuple(
    NamedTask(f"task{t}", tuple(names), (template,)) for t, (template, names) in enumerate(GOLDEN.meta["tasks"])
)
BACKBONE = """\
from golden import Golden

def create(directory):
    backbone = Golden.load().backbone
    return backbone.model, backbone.preprocess, backbone.tokenizer
"""


def state(learnt: int = T, dtype: torch.dtype = torch.float32, prefix: str = "module.") -> dict[str, Any]:
    """The authors' layout: rows of tasks that are not learnt yet hold what they were initialised with."""
    found: dict[str, Any] = {}
    room = T + 2
    for tower, ours in (("image_encoder", "image"), ("text_encoder", "text")):
        where = f"{tower}.transformer" if ours == "image" else tower
        for layer in range(2):
            pool = torch.full((room, 2, *GOLDEN.prompts("trained", 0)[f"{ours}.layer{layer}.keys"].shape), 9.0)
            for t in range(learnt):
                prompts = GOLDEN.prompts("trained", t)
                pool[t] = torch.stack([prompts[f"{ours}.layer{layer}.{name}"] for name in ("keys", "values")])
            found[f"{prefix}{where}.resblocks.{layer}.attn.prefix_pool"] = pool.to(dtype)
    embed_dim = GOLDEN.meta["embed_dim"]
    means, covariances = torch.zeros(room, embed_dim), torch.zeros(room, embed_dim, embed_dim)
    for t in range(learnt):
        means[t], covariances[t] = GOLDEN[f"task{t}.mean"], GOLDEN[f"task{t}.covariance"]
    statistics = {"means": means, "covars": covariances, "task_learnt": torch.tensor(learnt)}
    return found | {f"{prefix}{name}": value for name, value in statistics.items()}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "golden_backbone.py").write_text(BACKBONE)
    return parse(
        {
            "run": {"name": "released", "storage": str(tmp_path / "storage")},
            "backbone": {"name": str(tmp_path / "golden_backbone.py")},
            "tasks": [{"data": t.name, "name": t.name} for t in TASKS],
            "routing": {"density": "task"},
            "calibration": {
                "scale": GOLDEN.meta["calibration_scale"],  # the authors' constant; our default is the dimension
                "bias": GOLDEN.meta["calibration_bias"],
            },
        }
    )


def imported(config: Config, content: Any, path: Path) -> RunPredictor:
    torch.save(content, path)
    import_checkpoint(read_checkpoint(str(path)), TASKS, config)
    stored = config_of(RunStore.open(config.run.storage, config.run.name), backbone=config.backbone)
    return load_predictor(config.run.storage, config.run.name, stored)


def largest_difference(run: RunPredictor, learnt: int) -> float:
    """Of the logits, from the golden ones, over every test set under both routings; routes and votes are equal."""
    predictor: Predictor = run.predictor
    worst = 0.0
    for task in range(T):
        images = GOLDEN[f"task{task}.test.images"]
        frozen = predictor.frozen_features(images)
        scores = predictor.scores(frozen, range(learnt))
        expected = f"eval.learnt{learnt}.task{task}"
        batch = predictor.routes(scores, "batch")
        image = predictor.routes(scores, "image")
        assert batch.task.unique().tolist() == [int(GOLDEN[f"{expected}.batch.majority"])]
        assert image.task.tolist() == GOLDEN[f"{expected}.image.routed"].tolist()
        for routing, routes in (("batch", batch), ("image", image)):
            logits = predictor.logits(images, frozen, routes, run.candidates[task])
            worst = max(worst, float((logits - GOLDEN[f"{expected}.{routing}.logits"]).abs().max()))
    return worst


def test_an_imported_checkpoint_predicts_what_the_authors_code_predicted(config: Config, tmp_path: Path) -> None:
    run = imported(config, state(), tmp_path / "task_3.pt")
    assert run.tasks == tuple(t.name for t in TASKS)
    for learnt in range(1, T + 1):
        assert largest_difference(run, learnt) < 1e-4


def test_half_precision_prompts_as_released_cost_a_thousandth(config: Config, tmp_path: Path) -> None:
    run = imported(config, {"state_dict": state(dtype=torch.float16, prefix="")}, tmp_path / "task_3.pt")
    assert 1e-6 < largest_difference(run, T) < 1e-3


def test_the_given_covariance_is_what_is_read_back(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "task_3.pt")
    checkpoint = read_checkpoint(str(tmp_path / "task_3.pt"))
    for t in range(T):
        moments = checkpoint.moments(t)
        assert moments.count == NOMINAL_COUNT
        given = GOLDEN[f"task{t}.covariance"].double().numpy()
        np.testing.assert_allclose(moments.covariance(1e-7), given, rtol=0, atol=1e-18)
        np.testing.assert_allclose(moments.covariance(1e-3) - given, (1e-3 - 1e-7) * np.eye(len(given)), atol=1e-15)


def test_only_the_learnt_rows_are_imported_once_and_say_where_they_are_from(config: Config, tmp_path: Path) -> None:
    run = imported(config, state(learnt=2) | {"module.task_learnt": 2}, tmp_path / "task_2.pt")
    assert run.tasks == ("task0", "task1")
    store = RunStore.open(config.run.storage, config.run.name)
    again = import_checkpoint(read_checkpoint(str(tmp_path / "task_2.pt")), TASKS, config)
    assert [e.digest for e in again] == [e.digest for e in store.modules()]
    provenance = run.predictor.modules[1].provenance
    assert provenance["imported"]["task"] == 1
    assert "nominal (1025)" in provenance["count"]
    torch.save(state(), tmp_path / "task_3.pt")
    with pytest.raises(UserError, match="2 modules from elsewhere"):
        import_checkpoint(read_checkpoint(str(tmp_path / "task_3.pt")), TASKS, config)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save(state() | {"extra": Evil(trace)}, tmp_path / "new.pt")
    torch.save(state() | {"extra": Evil(trace)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(trace)))
    (tmp_path / "words.pt").write_bytes(b"not a checkpoint")
    for name in ("new.pt", "old.pt", "plain.pt", "words.pt"):
        with pytest.raises(DataError, match=r"is refused, and nothing in it was executed"):
            read_checkpoint(str(tmp_path / name))
    assert not trace.exists()
    torch.load(tmp_path / "new.pt", weights_only=False)  # the file does bite whoever trusts it
    assert trace.exists()


def without(content: dict[str, Any], part: str) -> dict[str, Any]:
    return {k: v for k, v in content.items() if part not in k}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: without(s, "prefix_pool"), "no prefix_pool"),
        (lambda s: without(s, "resblocks.0"), "not the first ones"),
        (lambda s: without(s, "means"), "has no means"),
        (lambda s: s | {"module.means": torch.zeros(T + 2, 7)}, "do not fit each other"),
        (lambda s: s | {"module.means": "words"}, "means should be a floating point tensor"),
        (lambda s: s | {"module.task_learnt": 99}, "task_learnt is 99"),
        (lambda s: s | {"module.task_learnt": torch.tensor(float("nan"))}, "whole number"),
        (lambda s: s | {"module.means": torch.full_like(s["module.means"], torch.inf)}, "not finite"),
        (lambda s: [s], "is not a checkpoint of the DIKI authors' layout"),
    ],
)
def test_other_layouts_are_one_sentence(damage: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    torch.save(damage(state()), tmp_path / "task_3.pt")
    with pytest.raises(DataError, match=said):
        read_checkpoint(str(tmp_path / "task_3.pt"))


def test_what_cannot_be_imported_says_why(config: Config, tmp_path: Path) -> None:
    broken = state()
    broken["module.covars"][1] = 0
    torch.save(broken, tmp_path / "broken.pt")
    torch.save(state(), tmp_path / "task_3.pt")
    good = read_checkpoint(str(tmp_path / "task_3.pt"))
    with pytest.raises(DataError, match="covariance of task 1 in the checkpoint is not positive definite"):
        import_checkpoint(read_checkpoint(str(tmp_path / "broken.pt")), TASKS, config)
    with pytest.raises(ConfigError, match="has learnt 3 tasks and only 2 are named"):
        import_checkpoint(good, TASKS[:2], config)
    embedded = config.model_copy(update={"backbone": type(config.backbone)()})
    with pytest.raises(ConfigError, match=r"embedding has 32 dimensions, that of 'embedded' has"):
        import_checkpoint(good, TASKS, embedded)
    assert RunStore.open(config.run.storage, config.run.name).modules() == ()


def test_the_job_imports_with_a_list_of_classes(
    config: Config, tmp_path: Path, job: Callable[..., tuple[int, str, str]]
) -> None:
    torch.save(state(), tmp_path / "task_3.pt")
    (tmp_path / "classes.json").write_text(json.dumps([vars(t) for t in TASKS]))
    classes = ("--classes", tmp_path / "classes.json", "--backbone", config.backbone.name)
    where = (config.run.storage, "job", *classes)
    code, said, _ = job("import_checkpoint", tmp_path / "task_3.pt", *where)
    assert code == 0
    assert "3 tasks imported (task0, task1, task2)" in said
    stored = config_of(RunStore.open(config.run.storage, "job"), backbone=config.backbone)
    assert load_predictor(config.run.storage, "job", stored).candidates[1].names == TASKS[1].class_names
    (tmp_path / "classes.json").write_text('[{"name": "a", "class_names": ["b"], "templates": ["no place"]}]')
    for checkpoint, sentence in (("task_3.pt", "exactly one {} each"), ("none.pt", "there is no such file")):
        code, _, errors = job("import_checkpoint", tmp_path / checkpoint, *where)
        assert code == 2
        assert sentence in errors
