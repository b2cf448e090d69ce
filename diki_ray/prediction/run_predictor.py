"""A stored run becomes a predictor here, for `diki-ray predict`, batch inference, bundles and serving.

A run's predictor needs its storage and nothing else: no cluster, and no lease, for it only reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from diki_ray.answering.class_features import Candidates, ClassFeatures, Exact
from diki_ray.answering.configured import COARSE_FROM_TASKS, build_predictor
from diki_ray.answering.image_answers import Answer, decide
from diki_ray.answering.predictor import Predictor
from diki_ray.config import Config
from diki_ray.config.templates import template_fault
from diki_ray.data.images import UndecodableImageError, at_size, decode_image
from diki_ray.errors import ConfigError, DataError
from diki_ray.learning.methods import Method
from diki_ray.learning.module import TaskModule
from diki_ray.runs.plan import build_method, device_of, load_backbone, precision_of
from diki_ray.runs.stored_run import check_backbone, config_of, open_learnt
from diki_ray.store.files import read_bytes
from diki_ray.store.run_store import RunStore

IMAGES_PER_PASS = 32


@dataclass(frozen=True, eq=False)
class RunPredictor:
    """Answers images with a run's modules, each for itself (`image` routing)."""

    predictor: Predictor
    candidates: tuple[Candidates, ...]
    """They are all classes learnt, each data set's under its own templates."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(module.task for module in self.predictor.modules)

    def among(self, class_names: Sequence[str], template: str) -> RunPredictor:
        """Returns the same modules, answering among any classes whatever (open vocabulary).

        Raises:
            ConfigError: no class, an empty name, or a template that has not exactly one {} and no other brace.
        """
        if not class_names or not all(name.strip() for name in class_names):
            raise ConfigError("the classes to choose from need at least one name, and none may be empty.")
        if (fault := template_fault(template)) is not None:
            raise ConfigError(f"the template {template!r:.200} {fault}.")
        return RunPredictor(self.predictor, (Candidates.of(self.predictor.backbone, class_names, [template]),))

    def answer(self, images: Iterable[Image.Image]) -> Iterator[Answer]:
        """Yields an answer for each RGB image, in order, computed `IMAGES_PER_PASS` at a time."""
        ready = map(self.predictor.backbone.preprocess, images)  # one full-size image in memory at a time
        while chunk := list(islice(ready, IMAGES_PER_PASS)):
            yield from self.answer_pixels(torch.stack(chunk))

    def answer_pixels(self, images: torch.Tensor) -> list[Answer]:
        """Answers one pass of preprocessed images [B, 3, H, W]."""
        return [d.answer for d in decide(self.predictor, images, [self.candidates] * len(images))]


def read_image(path: str) -> Image.Image:
    """Reads an image file as upright RGB, from wherever data may lie.

    Raises:
        DataError: there is none, or it cannot be decoded. StorageError: it cannot be read.
    """
    try:
        return decode_image(read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except UndecodableImageError as error:
        raise DataError(f"{path} cannot be used: {error}.") from None


def load_predictor(storage: str, run: str, config: Config | None = None) -> RunPredictor:
    """Builds the predictor over everything a run has learnt, from its storage alone.

    config: the run's own by default, which is stored with its results. Class features are computed at each image's own
    weight and not interpolated: right for a few images, slow for many.

    Raises:
        ConfigError: no such run, nothing learnt yet, no configuration, or a backbone that is not the run's.
    """
    store = open_learnt(storage, run)
    config, method = load_method(store, config)
    return predictor_over(config, method, read_modules(store), Exact())


def read_modules(store: RunStore) -> list[TaskModule]:
    """Reads every module that the run has learnt, verified."""
    return [TaskModule.from_bytes(store.read_module(entry.digest)) for entry in store.modules()]


def predictor_over(
    config: Config, method: Method, modules: Sequence[TaskModule], class_features: ClassFeatures
) -> RunPredictor:
    """Builds the predictor over modules that are at hand, among all classes learnt.

    Raises:
        ConfigError: a module of a backbone of other dimensions.
    """
    backbone = method.backbone
    for module in modules:
        if len(module.moments.mean) != backbone.embed_dim:
            raise ConfigError(
                f"task {module.task!r} was learnt on a backbone of {len(module.moments.mean)} dimensions and "
                f"{config.backbone.name!r} has {backbone.embed_dim}: give the configuration it was learnt with."
            )
    _check_parameters(method, modules)
    predictor = build_predictor(config, method, modules, class_features, COARSE_FROM_TASKS)
    return RunPredictor(predictor, tuple(Candidates.of(backbone, m.class_names, m.templates) for m in modules))


def _check_parameters(method: Method, modules: Sequence[TaskModule]) -> None:
    """Raises ConfigError for a module whose parameters are not those that the method trains, where every task's are
    alike: no run leaves it, whatever checksum it has."""
    if method.answering != "routed" or method.sequential:
        return
    expected = {name: tuple(p.shape) for name, p in method.initial(torch.Generator(), None).items()}
    for module in modules:
        if {name: p.shape for name, p in module.parameters.items()} != expected:
            raise ConfigError(
                f"the module of task {module.task!r} does not have the parameters of method {module.method!r} on this "
                "backbone: give the configuration it was learnt with, or train the task again."
            )


def load_method(store: RunStore, config: Config | None = None) -> tuple[Config, Method]:
    """Returns a run's configuration as it answers on this machine, and its method on its backbone, on the device.

    Raises:
        ConfigError: no configuration, or a backbone that is not the run's.
    """
    config = on_this_machine(config_of(store, config))
    backbone = load_backbone(config)
    check_backbone(store, backbone.name, backbone.digest())
    backbone.to(device_of(config), precision_of(config))
    return config, build_method(config, backbone)


def on_this_machine(config: Config) -> Config:
    """Returns the configuration with which a run that was trained on GPUs answers also on a machine that has none."""
    if config.train.device != "cuda" or torch.cuda.is_available():
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})


@dataclass(frozen=True, eq=False)
class Squares:
    """Says what a preprocessing makes of images that `at_size` has brought to the model's size: one value of each byte,
    whatever its place and its neighbours."""

    size_px: int
    values: torch.Tensor  # [3, 256], of the bytes of each channel

    @classmethod
    def of(cls, preprocess: Callable[[Any], torch.Tensor]) -> Squares | None:
        """Returns what `preprocess` does after CLIP's scaling; None: it begins with something else, or does more. It is
        tried on noise, which other scalings change."""
        noise = np.random.default_rng(0)

        def image_of(height: int, width: int) -> Image.Image:
            return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))

        try:
            size = preprocess(image_of(300, 400)).shape[-1]
            levels = np.resize(np.arange(256, dtype=np.uint8), (size, size))
            values = preprocess(Image.fromarray(np.stack([levels] * 3, axis=2))).flatten(1)[:, :256]
            found = cls(size, values.clone())
            shapes = ((3 * size + 1, 5 * size), (7 * size, 2 * size + 1), (size // 2, size - 1), (size, size))
            probes = [image_of(*shape) for shape in shapes]  # large, large and upright, to be enlarged, and as it is
            ours = found.pixels([at_size(image, size).tobytes() for image in probes])
            same = torch.equal(ours, torch.stack([preprocess(image) for image in probes]))
        except Exception:  # a preprocessing of the user's own may refuse such images, or give something else
            return None
        return found if same else None

    def pixels(self, squares: Sequence[bytes], device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns preprocessed images [B, 3, size_px, size_px] of the RGB bytes of B squares."""
        raw = torch.frombuffer(bytearray(b"".join(squares)) or bytearray(1), dtype=torch.uint8).to(device)
        levels = raw[: len(squares) * self.size_px**2 * 3].view(-1, self.size_px, self.size_px, 3).permute(0, 3, 1, 2)
        channels = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=device).view(3, 1, 1)
        # Else it would have its channels last in memory, and convolutions would round otherwise than for single images.
        return self.values.to(device).flatten()[levels.int() + channels].contiguous()
