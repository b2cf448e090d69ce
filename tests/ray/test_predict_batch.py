"""jobs/predict.py --output on a real local cluster: every input a row, and the answers of one-by-one prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stored_run import StoredRun, picture

from diki_ray.data import prepare
from diki_ray.prediction.run_predictor import RunPredictor, load_predictor

pytestmark = pytest.mark.cluster

IMAGES = [(task, seed) for seed in range(60) for task in ("warm", "cold", "lush")]  # more than two passes
TOLERANCE = 2e-3  # of a confidence: class features are interpolated


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    return StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold", "lush")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for n, (task, seed) in enumerate(IMAGES):
        (folder / task).mkdir(exist_ok=True)
        picture(task, 1000 + seed).save(folder / task / f"{n:03d}.png")
    (folder / "warm" / "words.png").write_bytes(b"words")
    Image.new("RGB", (2000, 1)).save(folder / "warm" / "line.png")
    return folder


@pytest.fixture
def predict(
    run: StoredRun, job: Callable[..., tuple[int, str, str]], local_cluster: str
) -> Callable[..., tuple[int, str, str]]:
    where = ("--storage", run.storage, "--run", "colours", "--backbone", run.config.backbone.name, "--num-workers", "2")
    return lambda *arguments: job("predict", *arguments, *where)


def confidences(run: RunPredictor, path: str) -> dict[str, float]:
    """Of every class, from class features at the image's own weight."""
    predictor = run.predictor
    pixels = predictor.backbone.preprocess(Image.open(path)).unsqueeze(0)
    frozen = predictor.frozen_features(pixels)
    routes = predictor.routes(predictor.scores(frozen), "image")
    features = predictor.image_features(pixels, frozen, routes)
    logits = torch.cat([predictor.logits_of_features(features, routes, c) for c in run.candidates], dim=1)
    names = [name for c in run.candidates for name in c.names]
    return dict(zip(names, logits.softmax(1)[0].tolist(), strict=True))


def test_every_input_is_a_row_answered_as_one_by_one(
    run: StoredRun, photos: Path, tmp_path: Path, predict: Callable[..., tuple[int, str, str]]
) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    code, said, errors = predict(photos, photos / "gone.png", "--output", output)
    assert code == 0, errors
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    files = sorted(str(path) for path in photos.rglob("*.png"))
    assert [row["image"] for row in rows] == [*files, str(photos / "gone.png")]
    assert {Path(row["image"]).name: row["error"] for row in rows if row["error"]} == {
        "words.png": "not an image",
        "line.png": "too long and thin",
        "gone.png": "no such file",
    }
    assert f"{len(rows)} images in" in said
    assert "3 images could not be used" in said
    assert "interpolated between 33 weights; the largest error" in said

    good = [row for row in rows if not row["error"]]
    exact = load_predictor(run.storage, "colours", run.config)
    expected = exact.answer(Image.open(row["image"]) for row in good)
    for row, answer in zip(good, expected, strict=True):
        assert row["task"] == answer.task
        if row["class_name"] != answer.class_name:  # only where interpolation cannot tell the two apart
            assert confidences(exact, row["image"])[row["class_name"]] >= answer.confidence - TOLERANCE
        assert row["confidence"] == pytest.approx(answer.confidence, abs=TOLERANCE)
        assert row["weight"] == pytest.approx(answer.weight, abs=1e-6)
        assert row["log_densities"] == pytest.approx(dict(answer.log_densities), rel=1e-6)
    assert {row["task"] for row in good} == {"warm", "cold", "lush"}


@pytest.mark.long
def test_shards_among_any_classes_into_parquet(
    photos: Path, tmp_path: Path, predict: Callable[..., tuple[int, str, str]]
) -> None:
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns("words.png", "line.png"))
    index = prepare.ensure(str(tmp_path / "photos"), str(tmp_path / "prepared"))
    shard = index.shard_uri(index.split("train").shards[0])
    output = tmp_path / "answers.parquet"
    code, said, _ = predict(index.uri, shard, "--output", output, "--classes", "a dog,a cat", "--template", "{}!")
    assert code == 0, said
    rows = pq.read_table(output).to_pylist()
    total = sum(split.num_samples for split in index.splits.values())
    assert len(rows) == total + index.split("train").shards[0].num_samples
    assert {row["class_name"] for row in rows} <= {"a dog", "a cat"}
    assert all(row["error"] is None for row in rows)
    assert rows[0]["image"].startswith(f"{index.uri}/")
    assert (output / "_SUCCESS").is_file()


def test_mistakes_are_one_sentence_and_leave_no_output(
    photos: Path, tmp_path: Path, predict: Callable[..., tuple[int, str, str]]
) -> None:
    output = tmp_path / "answers.jsonl"
    (tmp_path / "taken.jsonl").touch()
    for arguments, says in (
        ((photos / "warm", "--output", output, "--max-skipped", "1"), "2 images could not be used (1 × "),
        ((photos,), "give --output"),
        ((photos, "--output", tmp_path / "answers.csv"), "ends in .jsonl"),
        ((photos, "--output", tmp_path / "taken.jsonl"), "exists already"),
        ((photos / "*.webp", "--output", output), "matches no image"),
        ((photos, "--output", output, "--classes", "a,,b"), "none may be empty"),
        ((photos, "--output", output, "--cpus-per-worker", "100"), "needs 200 CPUs"),
    ):
        code, _, errors = predict(*arguments)
        assert code == 2, arguments
        assert errors.splitlines()[-1].startswith("error: ")
        assert says in errors.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["taken.jsonl"]
