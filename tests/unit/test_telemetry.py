"""Metrics by Prometheus' conventions, over real HTTP, with the values they claim."""

from __future__ import annotations

import re
import socket
import threading
import time
import urllib.request
from typing import Any

import pytest
from fake_store import FakeStore
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sample_results import sample_results

from diki_ray.config import Config, parse
from diki_ray.errors import ConfigError, StorageError
from diki_ray.runs.progress import BATCHES, SCORES
from diki_ray.runs.telemetry import MAX_PAIRED_TASKS, MAX_TASKS, Telemetry, exporting
from diki_ray.store.interface import RunStatus
from diki_ray.store.process import this_process

NAMES = ["digits", "neon", "mist"]


def config(port: int | None = None, **telemetry: Any) -> Config:
    return parse(
        {
            "run": {"name": "told"},
            "tasks": [{"data": f"embedded:{name}"} for name in NAMES],
            "telemetry": {"port": port} | telemetry,
        }
    )


def read(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(name, labels)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain")
        return reply.read().decode()


class StoreThatMayBeAway(FakeStore):
    """What an actor would say, or, while it is away, that it is not there."""

    away = False

    def status(self) -> RunStatus:
        if self.away:
            raise StorageError("away")
        return super().status()


def step(task: str, step: int, **more: Any) -> dict[str, Any]:
    event = {
        "kind": "step",
        "task": task,
        "epoch": 0,
        "num_epochs": 2,
        "step": step,
        "num_steps": 10,
        "loss": 2.0 / step,
    }
    return event | {"accuracy": 0.5, "images_per_s": 100.0, "num_nonfinite": 0} | more


# --- served ---------------------------------------------------------------------------------------------------------


def test_metrics_are_served_while_the_run_goes_on() -> None:
    port = free_port()
    with exporting(config(port), "own/image") as telemetry:
        telemetry.phase.state("train")
        page = get(port)
        assert 'diki_run_info{config_digest="' in page
        assert 'diki_phase{diki_phase="train"} 1.0' in page
        assert "diki_up 1.0" in page
        telemetry.on_event(step("digits", 1))
        assert 'diki_train_loss{task="digits"} 2.0' in get(port)
    with pytest.raises(OSError, match="refused"):
        get(port)


def test_the_last_values_linger_for_a_last_scrape() -> None:
    port = free_port()
    seen: list[str] = []

    def scrape_when_up_is_zero() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            page = get(port)
            if "diki_up 0.0" in page:
                seen.append(page)
                return
            time.sleep(0.02)

    with exporting(config(port, linger_s=1.0), "own/image"):
        thread = threading.Thread(target=scrape_when_up_is_zero)
        thread.start()
    thread.join()
    assert 'diki_phase{diki_phase="done"} 1.0' in seen[0]


def test_a_failed_run_says_so_and_frees_the_port() -> None:
    port = free_port()
    run = exporting(config(port), "own/image")
    telemetry = run.__enter__()
    error = ValueError("broken")
    assert not run.__exit__(type(error), error, None)
    assert read(telemetry, "diki_phase", diki_phase="failed") == 1
    with exporting(config(port), "own/image"):  # the port is free at once
        assert "diki_up 1.0" in get(port)


def test_an_interrupted_run_does_not_linger() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), exporting(config(free_port(), linger_s=60.0), "own/image"):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10


def test_a_taken_port_and_a_host_of_another_machine_are_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"telemetry\.port={port}.*choose a free port"):
            exporting(config(port), "own/image").__enter__()
    with pytest.raises(ConfigError, match=r"metrics cannot be served on 192\.0\.2\.1"):
        exporting(config(free_port(), host="192.0.2.1"), "own/image").__enter__()


def test_without_a_port_nothing_listens_and_values_are_kept() -> None:
    with exporting(config(), "own/image") as telemetry:
        telemetry.on_event(step("digits", 2))
        assert read(telemetry, "diki_train_loss", task="digits") == 1.0


# --- values ---------------------------------------------------------------------------------------------------------


def test_events_become_values() -> None:
    telemetry = Telemetry(config(), "own/image")
    telemetry.on_event(step("digits", 5, num_nonfinite=1))
    telemetry.on_event(step("digits", 10, kind="epoch", validation_accuracy=0.75, num_nonfinite=3, best_epoch=0))
    telemetry.on_event({"kind": "evaluated", "what": BATCHES, "done": 3, "total": 4})
    telemetry.on_event({"kind": "evaluated", "what": SCORES, "done": 0, "total": 4})
    assert read(telemetry, "diki_train_progress_ratio", task="digits") == 1
    assert read(telemetry, "diki_train_images_per_second", task="digits") == 100
    assert read(telemetry, "diki_train_epochs_total", task="digits") == 1
    assert read(telemetry, "diki_train_nonfinite_steps_total", task="digits") == 3
    assert read(telemetry, "diki_validation_accuracy_ratio", task="digits") == 0.75
    assert read(telemetry, "diki_evaluation_progress_ratio") == 0.75
    stamp = read(telemetry, "diki_last_progress_timestamp_seconds")
    assert stamp is not None
    assert abs(time.time() - stamp) < 5


def test_an_epoch_without_validation_leaves_no_value() -> None:
    telemetry = Telemetry(config(), "own/image")
    telemetry.on_event(step("digits", 1, kind="epoch", validation_accuracy=None))
    assert read(telemetry, "diki_validation_accuracy_ratio", task="digits") is None


def test_a_count_that_begins_again_with_its_process_keeps_growing() -> None:
    telemetry, store = Telemetry(config(), "own/image"), FakeStore()
    store.run.checkpoints.corrupt = 2
    telemetry.watch(store, NAMES)
    store.run.checkpoints.corrupt = 1  # the store's actor was started again and met one more
    telemetry.observe_store()
    telemetry.observe_store()
    assert read(telemetry, "diki_store_corrupt_checkpoints_total") == 3


def test_the_last_durable_write_is_as_of_the_scrape() -> None:
    telemetry, store = Telemetry(config(), "own/image"), StoreThatMayBeAway()
    telemetry.watch(store, NAMES)
    before, store.away = store.last_durable_write, True  # nothing else is asked of a store that is away
    store.run.acquire(this_process("another"), take_over=True)
    assert read(telemetry, "diki_store_last_durable_write_timestamp_seconds") == store.last_durable_write > before


def test_the_store_is_told_of_and_may_be_away() -> None:
    telemetry, store = Telemetry(config(), "own/image"), StoreThatMayBeAway()
    first, *others = [*NAMES, "elsewhere"]
    store.commit_module(first, first, b"x" * 1000)
    telemetry.watch(store, NAMES)
    assert read(telemetry, "diki_tasks") == 3
    assert read(telemetry, "diki_tasks_learnt") == 1
    for name in others:
        store.commit_module(name, name, b"x" * 1000)
    telemetry.observe_store()
    assert read(telemetry, "diki_tasks_learnt") == 3
    assert read(telemetry, "diki_store_modules") == 4
    assert read(telemetry, "diki_store_bytes") == 4000
    store.away = True
    telemetry.observe_store()
    assert read(telemetry, "diki_store_modules") == 4


def test_results_become_values() -> None:
    telemetry, results = Telemetry(config(), "own/image"), sample_results(NAMES)
    telemetry.on_results(results)
    telemetry.on_results(results)  # twice counts once
    for j, name in enumerate(NAMES):
        for i in range(3):
            assert read(telemetry, "diki_accuracy_ratio", task=name, stage=str(i + 1)) == results["accuracy"][i][j]
        assert read(telemetry, "diki_zero_shot_accuracy_ratio", task=name) == results["zero_shot"][j]
        assert read(telemetry, "diki_chance_accuracy_ratio", task=name) == pytest.approx(1 / 3)
    task = results["tasks"][1]
    counts = [*task["routed"]["tasks"], task["routed"]["frozen"]]
    for to, count in zip([*NAMES, "frozen"], counts, strict=True):
        assert read(telemetry, "diki_routed_ratio", task="neon", routed_to=to) == count / 200
    for domain in ("learnt", "unlearnt"):
        mean = task["weights"][domain]["mean"]
        assert read(telemetry, "diki_integration_weight_mean", task="neon", domain=domain) == mean
    assert read(telemetry, "diki_integration_weight_mean", task="digits", domain="unlearnt") is None
    skipped = {"task": "neon", "split": "test", "reason": "truncated image"}
    assert read(telemetry, "diki_skipped_samples_total", **skipped) == 2
    assert read(telemetry, "diki_stream_accuracy_ratio", metric="last") == results["metrics"]["last"]["mean"]
    assert read(telemetry, "diki_phase_duration_seconds", phase="train") == 7200


def test_a_long_stream_keeps_its_last_stage_and_its_diagonal() -> None:
    names = [f"t{n}" for n in range(MAX_PAIRED_TASKS + 8)]
    telemetry, results = Telemetry(config(), "own/image"), sample_results(names, epochs=1)
    telemetry.on_results(results)
    families = {f.name: f for f in telemetry.registry.collect()}
    assert len(families["diki_accuracy_ratio"].samples) == 2 * len(names) - 1
    assert len(families["diki_routed_ratio"].samples) == 2 * len(names)
    assert read(telemetry, "diki_accuracy_ratio", task="t3", stage="4") == results["accuracy"][3][3]
    assert read(telemetry, "diki_accuracy_ratio", task="t3", stage=str(len(names))) == results["accuracy"][-1][3]


def test_the_number_of_series_is_bounded_however_many_tasks_there_are() -> None:
    names = [f"t{n}" for n in range(MAX_TASKS + 100)]
    telemetry, results = Telemetry(config(), "own/image"), sample_results(names, epochs=1)
    for name in names:
        telemetry.on_event(step(name, 1, kind="epoch", num_nonfinite=1))
    telemetry.on_results(results)
    families = {f.name: f for f in telemetry.registry.collect()}
    assert len(families["diki_train_loss"].samples) == MAX_TASKS
    assert read(telemetry, "diki_train_loss", task=names[-1]) == 2.0  # the last that were trained
    assert read(telemetry, "diki_train_loss", task=names[99]) is None
    assert len(families["diki_zero_shot_accuracy_ratio"].samples) == MAX_TASKS
    worst = min(range(len(names)), key=results["accuracy"][-1].__getitem__)
    assert read(telemetry, "diki_zero_shot_accuracy_ratio", task=names[worst]) == results["zero_shot"][worst]
    telemetry.on_event(step("t0", 2, num_nonfinite=3))
    assert read(telemetry, "diki_train_nonfinite_steps_total", task="t0") == 3  # it is back, and counts from nothing
    samples = sum(len(family.samples) for family in telemetry.registry.collect())
    assert samples < 22 * MAX_TASKS


def test_names_units_and_help_follow_the_conventions() -> None:
    telemetry = Telemetry(config(), "own/image")
    telemetry.on_event(step("digits", 1, kind="epoch", validation_accuracy=0.5))
    telemetry.on_results(sample_results(NAMES))
    families = list(text_string_to_metric_families(generate_latest(telemetry.registry).decode()))
    assert len(families) > 25
    for family in families:
        assert re.fullmatch(r"diki_[a-z_]+", family.name)
        assert family.documentation.endswith((".", "…"))
        assert not family.name.endswith(("_total", "_percent", "_ms", "_mb"))  # counters get their suffix by type
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name.endswith(("_total", "_created"))
            if (
                family.name.endswith("_ratio") and family.name != "diki_stream_accuracy_ratio"
            ):  # a difference of ratios may be negative
                assert 0 <= sample.value <= 1
            assert all(re.fullmatch(r"[a-z_]+", label) for label in sample.labels)
