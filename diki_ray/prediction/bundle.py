"""A run becomes one safetensors file to hand on, with its modules, its configuration and the digest of its backbone.
A model card for people lies next to it. Loading needs neither the storage it came from nor Ray.

The backbone's weights are not in it (they are tens to thousands of times larger and have a home of their own); its
name and digest are, and loading refuses another.

    bundle.safetensors   header: config, backbone, each module's header and digest;
                         tensors: `<task number>/<name>`, as in the module's own file
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import diki_ray
from diki_ray.answering.class_features import Exact
from diki_ray.answering.image_answers import Answer
from diki_ray.clip.backbone import Backbone
from diki_ray.clip.trust import named_backbone, refuse_what_runs, with_backbone
from diki_ray.config import Config, parse_stored
from diki_ray.data.images import image_of
from diki_ray.errors import ConfigError, CorruptError, DataError
from diki_ray.learning.module import TaskModule, read_tensors, write_tensors
from diki_ray.prediction.run_predictor import RunPredictor, predictor_over, read_image
from diki_ray.report.model_card import load_arguments, model_card
from diki_ray.report.results import DOCUMENT
from diki_ray.report.results_schema import check_results
from diki_ray.runs.plan import build_method, device_of, load_backbone, precision_of
from diki_ray.runs.stored_run import check_backbone, config_of, open_learnt
from diki_ray.store.files import join, read_bytes, write_bytes

FORMAT = 1
BUNDLE, CARD, CONFIG = "bundle.safetensors", "README.md", "config.yaml"


def export_bundle(storage: str, run: str, folder: str, config: Config | None = None) -> int:
    """Writes a run's bundle, model card and configuration into a folder (any place data may lie); returns the bundle's
    size in bytes.

    config: the run's own by default. Where this machine keeps runs and prepared data is left out of what is written.

    Raises:
        ConfigError: no such run, no configuration, or another backbone than the run's. CorruptError: a damaged module.
    """
    store = open_learnt(storage, run)
    config = _portable(config_of(store, config))
    backbone = load_backbone(config)
    digest = backbone.digest()
    check_backbone(store, backbone.name, digest)
    entries = store.modules()
    headers: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        digest_of_module, blob = entry.digest, store.read_module(entry.digest)
        if (module := TaskModule.from_bytes(blob)).exemplars is not None:  # images are not handed on
            module = module.with_exemplars(None)
            digest_of_module, blob = module.digest, module.to_bytes()
        header, arrays = read_tensors(blob)
        headers.append({"digest": digest_of_module, "header": header})
        tensors |= {f"{number}/{name}": array for name, array in arrays.items()}
    content: dict[str, Any] = {
        "format": FORMAT,
        "run": run,
        "diki_ray": diki_ray.__version__,
        "config": config.model_dump(mode="json"),
        "backbone": {"name": config.backbone.name, "digest": digest, "embed_dim": backbone.embed_dim},
        "modules": headers,
    }
    blob = write_tensors(content, tensors)
    results = store.get_document(DOCUMENT)
    card = model_card(content, len(blob), results and check_results(results, f"{DOCUMENT} of run {run!r}"))
    for name, data in ((BUNDLE, blob), (CARD, card.encode()), (CONFIG, config.to_yaml().encode())):
        write_bytes(join(folder, name), data)
    return len(blob)


def _portable(config: Config) -> Config:
    run = config.run.model_copy(update={"storage": "runs", "take_over": False})
    data = config.data.model_copy(update={"root": "prepared"})
    return config.model_copy(update={"run": run, "data": data})


@dataclass(frozen=True, eq=False)
class Model:
    """Answers images with everything that a run has learnt; `diki_ray.load` gives one."""

    run: str
    predictor: RunPredictor

    @property
    def tasks(self) -> tuple[str, ...]:
        """They are in the order in which they were learnt."""
        return self.predictor.tasks

    @property
    def class_names(self) -> tuple[str, ...]:
        """They are all classes learnt, task by task."""
        return tuple(name for candidates in self.predictor.candidates for name in candidates.names)

    def predict(
        self,
        images: Iterable[Any],
        classes: Sequence[str] | None = None,
        template: str = "a photo of a {}.",
    ) -> list[Answer]:
        """Answers each image, in order; what an image gets does not depend on what else is asked.

        images: PIL images, arrays and tensors (see `image_of`), or files (local or s3://, gs://, az://, https://).
        classes: any class names, learnt or not, to choose among; all classes learnt by default.
        template: their caption, with {} for the name.

        Raises:
            DataError: an image that cannot be read. ConfigError: no class, or a template without its {}.
        """
        if isinstance(images, str | Path | Image.Image):
            raise DataError("images are given as a list, also when there is one: predict([image]).")
        predictor = self.predictor if classes is None else self.predictor.among(classes, template)
        return list(predictor.answer(map(_opened, images)))


def _opened(image: Any) -> Image.Image:
    return read_image(str(image)) if isinstance(image, str | Path) else image_of(image)


def load_bundle(
    path: str | Path,
    *,
    device: str = "auto",
    backbone: str | None = None,
    pretrained: str | None = None,
    directory: str | None = None,
) -> Model:
    """Loads the model of an exported run, in plain Python.

    path: the folder that `diki-ray export` wrote, or its bundle.safetensors.
    device: auto (a GPU where there is one), cpu or cuda.
    backbone, pretrained, directory: where this machine has the backbone, if elsewhere than the bundle says; its
        weights are compared with the run's. A Python file or a folder is taken from here alone: a bundle runs no code.

    Raises:
        DataError: no bundle there. CorruptError: a damaged one. ConfigError: the backbone is not the run's, or the
            bundle names one that needs the caller's word.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; it can be auto, cpu or cuda.")
    place = str(path) if str(path).endswith(".safetensors") else join(str(path), BUNDLE)
    try:
        content, tensors = read_tensors(read_bytes(place))
    except FileNotFoundError:
        raise DataError(f"there is no bundle {place}; `diki-ray export` makes one of a run.") from None
    _check_content(content, place)
    config = parse_stored(content["config"], source=place)
    told = named_backbone(backbone, pretrained, directory)
    if told is None:
        refuse_what_runs(config.backbone, f"the bundle {place}", load_arguments(config.backbone))
    else:
        config = with_backbone(config, told)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"device": device}),
        }
    )
    loaded = load_backbone(config)
    _check_weights(content["backbone"], loaded)
    loaded.to(device_of(config), precision_of(config))
    modules = [_module(place, number, m, tensors) for number, m in enumerate(content["modules"])]
    return Model(content["run"], predictor_over(config, build_method(config, loaded), modules, Exact()))


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    header: dict[str, Any]


class _Backbone(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(max_length=4096)]
    digest: str


class _Content(BaseModel):
    """A bundle says this of itself; what a module's own header may be is asked where it is read."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    run: Annotated[str, Field(max_length=4096)]
    config: dict[str, Any]
    backbone: _Backbone
    modules: list[_Header]


def _check_content(content: Any, place: str) -> None:
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))[:200]
        raise CorruptError(
            f"{place} is no bundle of format {FORMAT} ({field}: {first['msg']}): export the run again."
        ) from None


def _module(place: str, number: int, stored: dict[str, Any], tensors: dict[str, Any]) -> TaskModule:
    prefix = f"{number}/"
    own = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    blob = write_tensors(stored["header"], own)  # the same module gives the same bytes
    if hashlib.sha256(blob).hexdigest() != stored["digest"]:
        raise CorruptError(f"{place} is damaged: its task {number} does not have its checksum; export the run again.")
    return TaskModule.from_bytes(blob)


def _check_weights(expected: dict[str, Any], loaded: Backbone) -> None:
    if loaded.digest() != expected["digest"]:
        raise ConfigError(
            f"the backbone {loaded.name!r} loaded here does not have the weights of the bundle's "
            f"({expected['name']}): its modules mean nothing on it. Give backbone= and pretrained= of those."
        )
