"""Every JSON field and tensor of a small stored run replaced by values of other types and sizes, and every file by
another kind: each case ends in an answer or one sentence within ten seconds."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_run import StoredRun, picture

from diki_ray.answering.class_features import Exact
from diki_ray.errors import UserError
from diki_ray.learning.module import read_tensors, write_tensors
from diki_ray.prediction.run_predictor import predictor_over, read_modules
from diki_ray.runs.plan import build_method
from diki_ray.runs.stored_run import check_backbone
from diki_ray.runs.verification import problems_of
from diki_ray.store.library import key_path, module_path
from diki_ray.store.log import digest_of, seal, unseal
from diki_ray.store.run_store import RunStore

pytestmark = pytest.mark.long

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    1e300,
    "",
    "x",
    "\x1b[2J",
    "x" * 100_000,
    [],
    {},
    [[]],
    ["x"],
    {"x": 1},
]
ARRAYS: list[np.ndarray] = [np.zeros(0), np.zeros(3), np.zeros((2, 2)), np.full(64, np.nan), np.ones((8, 8), np.int8)]
KINDS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda p: None,
    "empty": lambda p: p.write_bytes(b""),
    "bytes": lambda p: p.write_bytes(bytes(range(256)) * 40),
    "deep": lambda p: p.write_bytes(b"[" * 200_000),
    "a pipe": os.mkfifo,
    "a folder": lambda p: p.mkdir(),
    "a device": lambda p: p.symlink_to("/dev/zero"),
    "a circle": lambda p: p.symlink_to(p),
    "gigabytes": lambda p: (p.touch(), os.truncate(p, 20 * 2**30)),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a tree."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield from places(part, (*path, name))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return tree


class Fuzzed:
    """The run, a copy for each case, and what a reader makes of it."""

    def __init__(self, folder: Path) -> None:
        self.run = StoredRun(folder, "warm")
        self.run.store.release(self.run.epoch)
        self.source, self.copy = Path(self.run.storage), folder / "copy"
        self.method = build_method(self.run.config, self.run.backbone)
        self.image = self.run.backbone.preprocess(picture("warm", 1))[None]
        self.failures: list[str] = []
        self.num_cases = 0

    def case(self, name: str, change: Callable[[Path], Any]) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.source, self.copy)
        change(self.copy)
        self.num_cases += 1
        for look in (self._answer, self._verify):
            signal.alarm(10)
            try:
                look()
            except UserError as error:
                if len(str(error)) > 3000:
                    self.failures.append(f"{name}: a sentence of {len(str(error))} characters")
            except Exception as error:
                self.failures.append(f"{name}: {look.__name__}: {type(error).__name__}: {str(error)[:150]}")
            finally:
                signal.alarm(0)

    def _answer(self) -> None:
        store = RunStore.open(str(self.copy), "colours")
        check_backbone(store, "b", self.run.backbone.digest())
        predictor = predictor_over(self.run.config, self.method, read_modules(store), Exact())
        for answer in predictor.answer_pixels(self.image) if predictor.candidates else ():
            assert np.isfinite(answer.confidence)

    def _verify(self) -> None:
        problems_of(RunStore.open(str(self.copy), "colours", salvage=True))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    def too_long(*_: object) -> None:
        raise TimeoutError("ten seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    yield Fuzzed(tmp_path_factory.mktemp("fuzzed"))
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def nothing_failed(fuzzed: Fuzzed) -> Iterator[None]:
    fuzzed.failures, fuzzed.num_cases = [], 0
    yield
    assert fuzzed.num_cases > 10
    assert not fuzzed.failures, "\n".join(fuzzed.failures)


def test_every_field_of_every_document(fuzzed: Fuzzed) -> None:
    for file in sorted(fuzzed.source.rglob("*.json")):
        name = file.relative_to(fuzzed.source)
        document = json.loads(file.read_bytes())
        sealed = set(document) == {"content", "sha256"}
        content = unseal(file.read_bytes(), "theirs") if sealed else document
        for path in places(content):
            for value in VALUES:
                changed = replaced(content, path, value)
                data = seal(changed) if sealed else json.dumps(changed).encode()
                fuzzed.case(f"{name} {path} {value!r:.20}", lambda c, n=name, d=data: (c / n).write_bytes(d))


def test_every_field_and_tensor_of_a_module(fuzzed: Fuzzed) -> None:
    (entry,) = fuzzed.run.store.modules()
    header, tensors = read_tensors(fuzzed.run.store.read_module(entry.digest))

    def placed(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Callable[[Path], None]:
        blob = write_tensors(header, tensors)
        named = {"digest": digest_of(blob), "num_bytes": len(blob)}

        def change(storage: Path) -> None:
            (storage / module_path(named["digest"])).write_bytes(blob)
            for path in (key_path(entry.key), f"runs/colours/log/{entry.seq:08d}.json"):
                file = storage / path
                file.write_bytes(seal(unseal(file.read_bytes(), path) | named))

        return change

    for path in places(header):
        for value in VALUES:
            fuzzed.case(f"header {path} {value!r:.20}", placed(replaced(header, path, value), tensors))
    for name, array in tensors.items():
        others = [*ARRAYS, array[:1], array.astype(np.float64), array.T, np.zeros_like(array), array[..., None]]
        for other in others:
            contiguous = np.ascontiguousarray(other)
            fuzzed.case(f"{name} {other.dtype} {other.shape}", placed(header, tensors | {name: contiguous}))
        fuzzed.case(f"without {name}", placed(header, {n: a for n, a in tensors.items() if n != name}))


def test_every_file_by_another_kind(fuzzed: Fuzzed) -> None:
    for file in sorted(path for path in fuzzed.source.rglob("*") if path.is_file()):
        name = file.relative_to(fuzzed.source)
        for kind, make in KINDS.items():
            fuzzed.case(f"{name} as {kind}", lambda c, n=name, m=make: ((c / n).unlink(), m(c / n)))
