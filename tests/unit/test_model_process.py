"""The model in a process of its own: it answers as in this one, and its end is noticed, whoever ends first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
import torch
from second_device import DEVICE, second_device
from stored_run import StoredRun, picture
from tiny_backbone import SOURCE

from diki_ray.errors import ConfigError
from diki_ray.runs.cluster import _SET_BY_USERS
from diki_ray.serving.app import Model
from diki_ray.serving.loaded_model import LoadedModel
from diki_ray.serving.model_process import ModelProcess
from diki_ray.serving.schema import Answered, Asked
from diki_ray.serving.settings import Settings
from diki_ray.serving.uploads import Refusal

FAR = 1e9
LEARNT, NAMED = Asked(), Asked(classes=["a dog", "a cat"], template="{}!")
OWN = "T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor()])"
CLIPS = "open_clip.image_transform(32, is_train=False)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    return StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold")


def settings_of(run: StoredRun) -> Settings:
    return Settings(storage=run.storage, run="colours", backbone=run.config.backbone.name, refresh_s=0.1)


@pytest.fixture(scope="module")
def process(run: StoredRun) -> Iterator[ModelProcess]:
    with pytest.MonkeyPatch.context() as patch:
        for name in _SET_BY_USERS:
            patch.delenv(name, raising=False)
        process = ModelProcess(settings_of(run))
    yield process
    process.close()
    assert process.process.returncode == 0


def images_for(model: Model) -> list[bytes]:
    """Pictures of both tasks as a service gives them to the model; one of them is too long to be scaled before."""
    pictures = [picture("warm", 1), picture("cold", 2), picture("warm", 3).resize((40, 1))]
    size = model.size_px
    at_size = [p.resize((size, size)).tobytes() if size else model.preprocessed(p.tobytes(), *p.size) for p in pictures]
    return [*at_size[:2], model.preprocessed(pictures[2].tobytes(), 40, 1)]


def answered(asked: list[Future[Answered | None]]) -> list[tuple[int, str | None, dict[str, object]]]:
    answers = [future.result(60) for future in asked]
    return [(a.version, a.task, json.loads(a.text)) for a in answers if a is not None]


@pytest.mark.parametrize(("preprocess", "size_px"), [(OWN, None), (CLIPS, 32)], ids=["own", "CLIP's"])
def test_it_answers_as_the_same_model_in_this_process(preprocess: str, size_px: int | None, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone.py"
    assert OWN in SOURCE
    backbone.write_text(SOURCE.replace(OWN, preprocess))
    run = StoredRun(tmp_path, "warm", "cold", backbone={"name": str(backbone)})
    here, process = LoadedModel(settings_of(run)), ModelProcess(settings_of(run))
    assert process.size_px == here.size_px == size_px
    images = images_for(here)
    assert images_for(process) == images
    for asked in (LEARNT, NAMED):
        told = answered(process.ask(images, asked, FAR, 3))
        for (version, task, answer), (_, right_task, right) in zip(
            told, answered(here.ask(images, asked, FAR, 3)), strict=True
        ):
            assert (version, task, answer["class_name"]) == (run.store.version, right_task, right["class_name"])
            assert answer["confidence"] == pytest.approx(right["confidence"], abs=1e-5)
            assert answer["log_densities"] == pytest.approx(right["log_densities"], rel=1e-4)
        assert [task for _, task, _ in told[:2]] == ["warm", "cold"]
    assert process.tasks() == here.tasks()
    counted = [line.split()[0] for line in process.exposed().splitlines() if not line.startswith("#")]
    assert counted == [line.split()[0] for line in here.exposed().splitlines() if not line.startswith("#")]
    assert "diki_serve_batch_images_sum 6.0" in process.exposed()
    here.close()
    process.close()


def test_it_keeps_what_a_pass_took(process: ModelProcess) -> None:
    assert b"glibc.malloc.trim_threshold" in Path(f"/proc/{process.process.pid}/environ").read_bytes()


def test_an_image_whose_time_is_over_is_not_answered(process: ModelProcess) -> None:
    late, answer = (process.ask(images_for(process)[:1], LEARNT, deadline, 1)[0] for deadline in (0.0, FAR))
    assert late.result(60) is None
    assert answer.result(60) is not None


def test_a_request_at_which_it_fails_is_refused_and_the_next_is_answered(process: ModelProcess) -> None:
    with pytest.raises(Refusal, match="the server's log says how") as refusal:
        process.preprocessed(b"too few", 40, 40)
    assert refusal.value.status == 500
    assert len(answered(process.ask(images_for(process), LEARNT, FAR, 3))) == 3


def test_it_follows_the_run(tmp_path: Path) -> None:
    run, ends = StoredRun(tmp_path, "warm"), list[str]()
    process = ModelProcess(settings_of(run), on_end=lambda: ends.append("noticed"))
    run.store.remove_task(run.epoch, "warm")
    until = time.monotonic() + 60
    while process.tasks().tasks:
        assert time.monotonic() < until
        time.sleep(0.05)
    (refused,) = process.ask(images_for(process)[:1], LEARNT, FAR, 1)
    with pytest.raises(Refusal, match="the run has no task at present"):
        refused.result(60)
    version = run.learn("cold")
    while process.tasks().version != version:
        assert time.monotonic() < until
        time.sleep(0.05)
    ((_, task, _),) = answered(process.ask(images_for(process)[1:2], LEARNT, FAR, 1))
    assert task == "cold"
    process.close()
    assert process.process.returncode == 0
    assert ends == []  # it was asked for


def test_what_waits_for_a_process_that_is_killed_is_refused(run: StoredRun) -> None:
    ends = list[str]()
    process = ModelProcess(settings_of(run), on_end=lambda: ends.append("noticed"))
    images = images_for(process)
    os.kill(process.process.pid, signal.SIGSTOP)
    waiting = process.ask(images, LEARNT, FAR, 3)
    assert waiting[2].cancel()  # whoever asked has gone
    process.process.kill()
    for answer in (*waiting[:2], *process.ask(images, LEARNT, FAR, 3)):
        with pytest.raises(Refusal, match="try again in a second") as refusal:
            answer.result(10)
        assert refusal.value.status == 503
    until = time.monotonic() + 10
    while not ends:
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(Refusal):
        process.tasks()
    process.close()
    assert ends == ["noticed"]


def test_it_ends_with_the_process_that_asks(run: StoredRun) -> None:
    program = (
        "import sys, time\n"
        "from diki_ray.serving.model_process import ModelProcess\n"
        "from diki_ray.serving.settings import Settings\n"
        "process = ModelProcess(Settings.model_validate_json(sys.argv[1]))\n"
        "print(process.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, settings_of(run).model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    child.wait(10)


def test_why_it_cannot_be_loaded_is_said_in_one_sentence(run: StoredRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no run 'other'"):
        ModelProcess(settings_of(run).model_copy(update={"run": "other"}))
    backbone = tmp_path / "backbone.py"
    for source, said in (
        ("def create(directory):\n    raise ValueError('no weights')", "no weights"),
        ("import os\nos._exit(3)", "ended while"),
    ):
        backbone.write_text(source)
        with pytest.raises(ConfigError, match=said) as error:
            ModelProcess(settings_of(run).model_copy(update={"backbone": str(backbone)}))
        assert len(str(error.value).splitlines()) == 1


def test_images_of_a_pass_are_on_the_same_device_however_they_came(tmp_path: Path) -> None:
    backbone = tmp_path / "backbone.py"
    backbone.write_text(SOURCE.replace(OWN, CLIPS))
    model = LoadedModel(settings_of(StoredRun(tmp_path, "warm", "cold", backbone={"name": str(backbone)})))
    images = images_for(model)
    expected = torch.stack(model._pixels(images))
    with second_device():
        model.snapshots.backbone.to(DEVICE)
        pixels = torch.stack(model._pixels(images))
        assert pixels.device.type == DEVICE.type
        assert torch.equal(pixels.cpu(), expected)
    model.close()


def test_a_replica_itself_imports_no_torch() -> None:
    said = "import sys, diki_ray.serving.deployment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
