"""The exemplar memory of a run: what is recalled of the tasks before, and what is kept of a task that is learnt.

Each module holds the exemplars of its own task alone, so that they are stored, found again and removed with it; what a
task is trained on beside its own images follows from those of its predecessors (learning/exemplars.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.config.methods import ReplaySection
from diki_ray.data.images import UndecodableImageError, decode_image
from diki_ray.data.index import DatasetIndex
from diki_ray.data.shards import decode_sample, read_encoded
from diki_ray.errors import CorruptError
from diki_ray.learning.collective import gather_objects
from diki_ray.learning.exemplars import Budget, Exemplars, scores, transforms
from diki_ray.learning.methods import Method
from diki_ray.learning.methods.replay import Replay
from diki_ray.learning.module import TaskModule
from diki_ray.runs.train.task_data import TaskData

EARLIER = "replayed"
"""A module's provenance has here the keys of the modules before it whose exemplars were replayed, in order."""


@dataclass(frozen=True)
class Memory:
    """The modules of the tasks before, in order, whose exemplars make up the memory."""

    settings: ReplaySection
    earlier: tuple[TaskModule, ...]

    @staticmethod
    def before(predecessor: str | None, settings: ReplaySection, module_of: Callable[[str], TaskModule]) -> Memory:
        """What is remembered when a task begins whose predecessor's module has this key.

        Raises:
            CorruptError: the predecessor has no exemplars, or does not say which modules were before it.
        """
        if predecessor is None:
            return Memory(settings, ())
        last = module_of(predecessor)
        keys = last.provenance.get(EARLIER)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CorruptError(f"the module of task {last.task!r} does not say what was replayed before it.")
        memory = Memory(settings, (*(module_of(key) for key in keys), last))
        if any(module.exemplars is None for module in memory.earlier):
            raise CorruptError(f"a module that task {last.task!r} was learnt after has lost its exemplars.")
        return memory

    @property
    def keys(self) -> list[str]:
        return [module.key for module in self.earlier]

    @property
    def budget(self) -> Budget:
        s = self.settings
        return Budget(s.num_images, s.max_bytes, s.score, s.choice)

    @property
    def exemplars(self) -> list[Exemplars]:
        return [module.exemplars for module in self.earlier if module.exemplars is not None]

    def replay(self, method: Method) -> Replay | None:
        """What the next task is trained on beside its own images; None before there is any.

        Raises:
            CorruptError: an image that no task can have been learnt from.
        """
        images: list[Tensor] = []
        classes: list[int] = []
        tokens: list[Tensor] = []
        for module, all_of_task, places in zip(
            self.earlier, self.exemplars, self.budget.kept(self.exemplars), strict=True
        ):
            kept = all_of_task.chosen(places)
            classes += (kept.labels + sum(map(len, tokens))).tolist()
            images += [_pixels(data, module.task, method.backbone) for data in kept.images]
            tokens.append(method.backbone.tokenize(module.class_names, module.templates[0]))
        if not images:
            return None
        s = self.settings
        return Replay(method, torch.stack(images), torch.tensor(classes), torch.cat(tokens), s.batch_size, s.weight)

    @torch.no_grad()
    def with_exemplars(self, module: TaskModule, data: TaskData, method: Method) -> TaskModule:
        """The module of a task that is learnt with the exemplars that are kept of it. Every rank must call it, and each
        gets the same."""
        budget = self.budget
        places, labels, found = _scored(module, data, method, budget)
        # Of what can at most be kept the files are read, and then their bytes are counted.
        candidates = Exemplars(tuple(b"" for _ in places), labels, found)
        most = budget.kept(self.exemplars, candidates)[-1]
        files = _files(data.task.index, places[most].tolist())
        read = Exemplars(tuple(files), labels[most], found[most])
        kept = read.chosen(budget.kept(self.exemplars, read)[-1])
        return module.with_exemplars(kept, {EARLIER: self.keys})


def _pixels(data: bytes, task: str, backbone: Backbone) -> Tensor:
    """Stored bytes go through the decoder and the formats that every image goes through."""
    try:
        return backbone.preprocess(decode_image(data))
    except UndecodableImageError as error:
        raise CorruptError(
            f"an exemplar of task {task!r} cannot be used ({error}), and no task was learnt from it: remove the task "
            "from the run and learn it again."
        ) from None


def _scored(
    module: TaskModule, data: TaskData, method: Method, budget: Budget
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in the training split, labels and scores of all training images that can be read, by ascending places."""
    score = _drawn(data) if budget.score in ("random", "reservoir") else _by_logits(module, data, method, budget)
    own = [batch for part in data.own_parts for batch in _batches(data, part, score)]
    found = [batch for batches in gather_objects(own) for batch in batches]
    places, labels, values = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = places.argsort()
    return places[order], labels[order], values[order]


_ScoreOf = Callable[[Tensor, np.ndarray], np.ndarray]
"""The scores of images at these places of the training split."""


def _batches(data: TaskData, part: int, score: _ScoreOf) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for batch in data.batches_of("train", part):
        places = np.array(batch.positions, np.int64)
        yield places, batch.labels.cpu().numpy(), score(batch.images, places)


def _drawn(data: TaskData) -> _ScoreOf:
    """Random numbers, one for each image, whoever asks."""
    generator = torch.Generator().manual_seed(data.task.seed)
    drawn = torch.rand(data.task.index.split("train").num_samples, generator=generator, dtype=torch.float64).numpy()
    return lambda images, places: drawn[places]


def _by_logits(module: TaskModule, data: TaskData, method: Method, budget: Budget) -> _ScoreOf:
    """Scores images by their logits among the task's classes, under the parameters that answer."""
    device = data.backbone.device
    stored: Parameters = {name: torch.from_numpy(p).to(device) for name, p in sorted(module.parameters.items())}
    parameters = method.effective(stored)
    texts = method.text_features(data.backbone.tokenize(module.class_names, module.templates[0]), parameters)

    def score(images: Tensor, places: np.ndarray) -> np.ndarray:
        views = transforms(images) if budget.score == "bregman" else [images]
        logits = [data.backbone.logits(method.image_features(view, parameters), texts) for view in views]
        return scores(budget.score, torch.stack(logits)).cpu().numpy()

    return score


def _files(index: DatasetIndex, places: Sequence[int]) -> list[bytes]:
    """The encoded images at these places of the training split."""
    found: dict[int, bytes] = {}
    first = 0
    for shard in index.split("train").shards:
        where = index.shard_uri(shard)
        for place in sorted(p for p in places if first <= p < first + shard.num_samples):
            number = place - first
            [encoded] = read_encoded(where, shard, number, number + 1)
            found[place] = decode_sample(encoded, shard, number, where, len(index.class_names)).image
        first += shard.num_samples
    return [found[place] for place in places]
