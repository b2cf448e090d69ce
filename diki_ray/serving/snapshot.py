"""A run is served as one immutable snapshot of its modules at a time, which is replaced when the run's log says so.

A request takes the current snapshot once and is answered under it to the end, so no answer mixes two versions. A later
one is built meanwhile from verified modules, and becomes current in one assignment. If it cannot be built (storage
away, a damaged module) the former stays, and says since when it is stale.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diki_ray.answering.class_features import Candidates, Tabulated
from diki_ray.answering.configured import COARSE_FROM_TASKS, build_predictor
from diki_ray.answering.predictor import Predictor
from diki_ray.clip.backbone import Backbone
from diki_ray.clip.trust import named_backbone
from diki_ray.errors import UserError
from diki_ray.learning.module import TaskModule
from diki_ray.prediction.run_predictor import load_method
from diki_ray.runs.stored_run import config_of, noted_text_error, open_learnt
from diki_ray.serving.settings import Settings

logger = logging.getLogger(__name__)

_KEPT_VOCABULARIES = 64


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Holds the modules of one version, ready to answer."""

    version: int
    digests: tuple[str, ...]
    """They are the modules', in their order."""
    predictor: Predictor
    learnt: tuple[Candidates, ...]
    """They are every task's own classes, under its own templates."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(module.task for module in self.predictor.modules)


class Vocabularies:
    """Makes candidates of class names and keeps the last few that requests named. It is thread-safe, as a tokenizer of
    open_clip's remembers every word it ever met, in a dictionary that is cut here back to what it was."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[tuple[str, ...], str], Candidates] = OrderedDict()
        words = getattr(backbone.tokenizer, "cache", None)
        self._words: dict[str, Any] | None = words if isinstance(words, dict) else None
        self._first_words = dict(self._words or {})

    def learnt(self, module: TaskModule) -> Candidates:
        with self._lock:
            return self._tokenized(module.class_names, module.templates)

    def named(self, class_names: Sequence[str], template: str) -> Candidates:
        key = (tuple(class_names), template)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._tokenized(class_names, [template], passing=True)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT_VOCABULARIES:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _tokenized(self, class_names: Sequence[str], templates: Sequence[str], passing: bool = False) -> Candidates:
        candidates = Candidates.of(self._backbone, class_names, templates, passing)
        if self._words is not None:
            self._words.clear()
            self._words.update(self._first_words)
        return candidates


class Snapshots:
    """Keeps the current snapshot of a run and follows its storage, without a lease: nothing is written.

    Raises:
        ConfigError, StorageError: no such run, or it cannot be read (only the first time).
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._store = open_learnt(settings.storage, settings.run)
        told = named_backbone(settings.backbone, settings.pretrained, settings.directory)
        self._config, self._method = load_method(self._store, config_of(self._store, backbone=told))
        self.backbone = self._method.backbone
        self.vocabularies = Vocabularies(self.backbone)
        self.class_features = Tabulated(settings.text_grid, settings.learnt_cache_bytes, settings.named_cache_bytes)
        self._modules: dict[str, TaskModule] = {}
        self._candidates: dict[str, Candidates] = {}
        self.failures = 0
        self.stale_since: float | None = None
        self.text_feature_error: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.current = self._built()

    def refresh(self) -> bool:
        """Reads the run's log; returns True when other modules are served from now on. It never raises: the former
        stay."""
        try:
            version = self._store.refresh()
            changed = tuple(entry.digest for entry in self._store.modules()) != self.current.digests
            if changed:
                self.current = self._built(self.current.predictor)
                logger.info("run %s: version %d, tasks %s", self.settings.run, version, ", ".join(self.current.tasks))
            elif version != self.current.version:
                self.current = replace(self.current, version=version)
        except Exception as error:  # also a defect in a module's content must not end the thread that follows the run
            self.failures += 1
            self.stale_since = self.stale_since or time.time()
            known = isinstance(error, UserError)
            logger.warning("run %s is served as it was: %s", self.settings.run, error, exc_info=not known)
            return False
        self.stale_since = None
        return changed

    def follow(self) -> None:
        """Refreshes every `refresh_s` in a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self._follow, name="diki-serve-refresh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self.settings.refresh_s):
            self.refresh()

    def _built(self, former: Predictor | None = None) -> Snapshot:
        entries = self._store.modules()
        # Tasks and their digests are of one state of the log, and a digest is checked when its module is read.
        modules = {e.digest: self._modules.get(e.digest) or self._read(e.digest) for e in entries}
        ordered = [modules[entry.digest] for entry in entries]
        # Snapshots share what they have in common, or each would hold all tasks' tokens.
        known = self._candidates
        candidates = {d: known.get(d) or self.vocabularies.learnt(module) for d, module in modules.items()}
        snapshot = Snapshot(
            version=self._store.version,
            digests=tuple(entry.digest for entry in entries),
            predictor=build_predictor(
                self._config, self._method, ordered, self.class_features, COARSE_FROM_TASKS, former
            ),
            learnt=tuple(candidates[entry.digest] for entry in entries),
        )
        self._modules, self._candidates = modules, candidates
        self.text_feature_error = noted_text_error(self._store, self.settings.text_grid)
        return snapshot

    def _read(self, digest: str) -> TaskModule:
        module = TaskModule.from_bytes(self._store.read_module(digest))
        if len(module.moments.mean) != self.backbone.embed_dim:
            raise UserError(f"task {module.task!r} was learnt on another backbone: start the server anew.")
        return module
