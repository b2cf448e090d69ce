"""A worker of batch prediction, in this process: the answers of one-by-one prediction, and a row for everything."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image
from stored_run import StoredRun, picture

from diki_ray.data.inputs import parts_of, to_json
from diki_ray.prediction import batch, batch_worker
from diki_ray.prediction.batch_reader import READ, read_parts
from diki_ray.prediction.batch_worker import ANSWERED, COMPUTED_S, Learnt, Worker, interpolation_error
from diki_ray.prediction.run_predictor import Squares, load_predictor
from diki_ray.runs.stored_run import noted_text_error


def test_answers_are_those_of_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = StoredRun(tmp_path, "warm", "cold", "lush")
    for n, task in enumerate(("warm", "warm", "cold", "lush")):  # the only image of a task in its batch, too
        picture(task, 500 + n).save(tmp_path / f"{n}.png")
    (tmp_path / "words.png").write_bytes(b"words")
    Image.new("RGB", (2000, 1)).save(tmp_path / "line.png")
    learnt = Learnt.of(run.storage, "colours", run.config, None, "a photo of a {}.")
    monkeypatch.setattr(batch_worker.ray, "get", lambda reference: reference)
    worker = Worker(pickle.loads(pickle.dumps(learnt)))
    parts = parts_of([str(tmp_path / "*.png"), str(tmp_path / "gone.png")])
    tables = [worker(table) for table in read_parts({"part": [to_json(part) for part in parts]}, None)]
    assert all(table.schema == ANSWERED.append(COMPUTED_S) for table in tables)
    rows = pa.concat_tables(tables).to_pylist()
    assert [(Path(row["image"]).stem, row["error"]) for row in rows] == [
        *((str(n), None) for n in range(4)),
        ("line", "too long and thin"),
        ("words", "not an image"),
        ("gone", "no such file"),
    ]
    expected = load_predictor(run.storage, "colours", run.config).answer(Image.open(row["image"]) for row in rows[:4])
    error = interpolation_error(learnt, ["warm", "cold", "lush"])
    assert 0 < error < 0.01
    for row, answer in zip(rows, expected, strict=False):
        assert (row["class_name"], row["task"]) == (answer.class_name, answer.task)
        assert row["confidence"] == pytest.approx(answer.confidence, abs=2e-3)
        assert row["weight"] == pytest.approx(answer.weight, abs=1e-6)
        assert dict(row["log_densities"]) == pytest.approx(dict(answer.log_densities), rel=1e-5)


def test_what_is_scaled_where_it_is_read_is_what_the_preprocessing_makes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_worker.ray, "get", lambda reference: reference)
    run = StoredRun(tmp_path, "warm", "cold")
    for n, size in enumerate(((300, 200), (20, 31), (32, 32))):
        pixels = np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_bytes(b"words")
    Image.new("RGB", (2000, 1)).save(tmp_path / "4.png")
    preprocess = open_clip.image_transform(32, is_train=False)
    learnt = Learnt.of(run.storage, "colours", run.config, None, "a photo of a {}.")
    squares = Squares.of(preprocess)
    assert learnt.squares is None
    assert squares is not None
    parts = {"part": [to_json(part) for part in parts_of([str(tmp_path / "*.png")])]}
    workers = {None: Worker(learnt), 32: Worker(pickle.loads(pickle.dumps(replace(learnt, squares=squares))))}
    found, reasons = {}, {}
    for size_px, worker in workers.items():
        worker._predictor.predictor.backbone.preprocess = preprocess
        rows = pa.concat_tables(read_parts(parts, size_px)).to_pylist()
        found[size_px], reasons[size_px] = worker._preprocessed(
            [row["data"] for row in rows], [row["error"] for row in rows]
        )
    assert torch.equal(found[None], found[32])
    assert reasons[None] == reasons[32] == [None, None, None, "not an image", "too long and thin"]
    assert workers[32]._preprocessed([None], [None])[1] == ["not read"]
    assert len(workers[32]._preprocessed([None], ["no such file"])[0]) == 0


def test_a_backbone_in_bfloat16_is_known_again_on_a_worker(tmp_path: Path) -> None:
    run = StoredRun(tmp_path, "warm", "cold")
    half = run.config.model_copy(update={"backbone": run.config.backbone.model_copy(update={"precision": "bfloat16"})})
    learnt = Learnt.of(run.storage, "colours", half, None, "a photo of a {}.")
    assert learnt.predictor().predictor.backbone.dtype is torch.bfloat16


def test_the_rate_and_the_share_of_computing_count_from_the_first_answers_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 101.0, 102.0, 103.0, 107.0, 113.0))
    monkeypatch.setattr(batch.time, "monotonic", lambda: next(clock))
    tally = batch.Tally(num_workers=2)
    row = {"image": "a.png", "error": None, "task": "warm", "computed_s": 0.5}
    tally.add(pa.Table.from_pylist([row] * 50))
    assert tally.images_per_s == 0
    for _ in range(3):  # both workers have given two
        tally.add(pa.Table.from_pylist([row] * 8))
    assert tally.computing_share == 0
    tally.add(pa.Table.from_pylist([row] * 8))
    tally.add(pa.Table.from_pylist([row | {"computed_s": 0.75}] * 12))
    assert tally.images_per_s == pytest.approx(44 / 13)
    assert tally.computing_share == pytest.approx((8 * 0.5 + 12 * 0.75) / 10 / 2)


def test_workers_answer_a_table_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = StoredRun(tmp_path, "warm", "cold")
    monkeypatch.setattr(batch_worker.ray, "get", lambda reference: reference)
    worker = Worker(Learnt.of(run.storage, "colours", run.config, None, "a photo of a {}."))
    assert worker(READ.empty_table()).schema == ANSWERED.append(COMPUTED_S)


@pytest.mark.parametrize(
    ("images", "workers", "blocks"),
    [
        ([64] * 400, 2, 100),  # 256 images in each
        ([64] * 40, 2, 16),  # a small job: eight for each worker
        ([64] * 5, 2, 5),  # no more than there are parts
        ([None] * 20, 1, 20),  # of a tar is not known how many it has
        ([5000] * 3, 4, 3),
        ([64] * 10**6, 2, batch.MAX_BLOCKS),
    ],
)
def test_a_large_job_has_blocks_of_many_images_and_a_small_one_enough_for_every_worker(
    images: list[int | None], workers: int, blocks: int
) -> None:
    assert batch._num_blocks(images, workers) == blocks


@pytest.mark.parametrize(
    ("there", "num", "readers"),
    [(2, 2, 2), (1, 1, 2), (64, 8, 16), (10, 8, 10), (0, 16, 32)],  # the last cluster grows once it is asked
)
def test_no_more_processes_read_than_there_are_cpus_unless_the_cluster_is_still_to_grow(
    there: int, num: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.ray, "cluster_resources", lambda: {"CPU": float(there)} if there else {})
    assert batch._readers(num, 1.0, threads=2) == readers


def test_processes_that_read_do_without_torch() -> None:
    said = "import sys, diki_ray.prediction.batch_reader; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True).stdout == "False\n"


def test_the_error_of_class_features_is_the_evaluations_where_it_had_the_same_modules_and_grid(tmp_path: Path) -> None:
    run = StoredRun(tmp_path, "warm", "cold")

    def known(classes: list[str] | None = None) -> float | None:
        return Learnt.of(run.storage, "colours", run.config, classes, "a photo of a {}.").text_error

    results = run.store.get_document("results.json")
    assert known() is None  # an evaluation of other modules
    for task, entry in zip(results["tasks"], run.store.modules(), strict=True):
        task["module"]["digest"] = entry.digest
    run.store.put_document(run.epoch, "results.json", results)
    assert known() == results["notes"]["text_feature_error"] > 0
    assert known(["red", "blue"]) is None
    assert noted_text_error(run.store, results["notes"]["text_grid"] + 1) is None
    run.learn("lush")
    assert known() is None
