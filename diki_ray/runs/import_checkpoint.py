"""The DIKI authors' released checkpoints (`task_N.pt`) as modules of a store.

Such a file holds one state dictionary: `…resblocks.L.attn.prefix_pool [tasks, 2, length, width]` (keys, then values) of
`image_encoder` and `text_encoder`, `means [tasks, E]`, `covars [tasks, E, E]` and `task_learnt`; only that many rows
are set. Class names and their order are not inside: whoever imports one says which data sets it was trained on.

A checkpoint is a pickle from elsewhere: only tensors and plain containers are read (`weights_only`), anything else is
refused before it runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diki_ray
from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config
from diki_ray.config.methods import DikiSection
from diki_ray.config.templates import template_fault
from diki_ray.errors import ConfigError, DataError, UserError
from diki_ray.learning.module import TaskModule, module_key
from diki_ray.learning.moments import Moments
from diki_ray.runs.plan import build_method, load_backbone
from diki_ray.store.files import read_bytes
from diki_ray.store.log import Entry
from diki_ray.store.process import this_process
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore

AUTHORS_EPS = 1e-7
"""What the authors' code added to the diagonal before it stored a covariance."""
NOMINAL_COUNT = 1025
"""Images behind an imported covariance, of which the file says nothing. 1024 = 2^10, so that scatter = 1024·Σ is exact
and reading it back gives Σ bit for bit; shrinkage, which does depend on the count, has no meaning for these modules."""

_PROMPTS = re.compile(r"(?:^|\.)(image|text)_encoder\.(?:.*\.)?resblocks\.(\d+)\.attn\.prefix_pool$")


@dataclass(frozen=True)
class NamedTask:
    """What a checkpoint does not say about one of its tasks."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tasks that were learnt, in float32 (prompts) and float64 (statistics).

    prompts: for `image` and `text` the blocks from the first, each [T, 2, length, width].
    """

    prompts: Mapping[str, tuple[Tensor, ...]]
    means: np.ndarray  # [T, E]
    covariances: np.ndarray  # [T, E, E], ε included
    sha256: str

    @property
    def num_tasks(self) -> int:
        return len(self.means)

    def method(self) -> DikiSection:
        """Depth and length as the tensors have them; a tower without prompts has depth 0."""
        shape = {tower: (len(blocks), blocks[0].shape[2] if blocks else 1) for tower, blocks in self.prompts.items()}
        return DikiSection(
            image_depth=shape["image"][0],
            image_length=shape["image"][1],
            text_depth=shape["text"][0],
            text_length=shape["text"][1],
        )

    def parameters(self, task: int) -> dict[str, np.ndarray]:
        """The task's prompts under the names that the method gives them."""
        return {
            f"{tower}.layer{layer}.{name}": block[task, side].numpy().copy()
            for tower, blocks in self.prompts.items()
            for layer, block in enumerate(blocks)
            for side, name in enumerate(("keys", "values"))
        }

    def moments(self, task: int) -> Moments:
        """Moments whose covariance(1e-7) is the stored one, under a nominal count.

        Raises:
            DataError: no Gaussian has this covariance.
        """
        covariance = self.covariances[task]
        try:
            np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            raise DataError(
                f"the covariance of task {task} in the checkpoint is not positive definite: the file is damaged, or "
                "was written after fewer images than its dimensions in half precision."
            ) from None
        scatter = (covariance - AUTHORS_EPS * np.eye(len(covariance))) * (NOMINAL_COUNT - 1)
        return Moments(NOMINAL_COUNT, self.means[task], scatter)


def read_checkpoint(path: str) -> Checkpoint:
    """The learnt tasks of a `task_N.pt`, from wherever data may lie. Nothing in the file is executed.

    Raises:
        DataError: no such file, objects other than tensors in it, or tensors that are not of this layout.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes from elsewhere: torch raises half a dozen types, and every one means the same
        raise DataError(
            f"{path} is refused, and nothing in it was executed: it is no torch file of tensors and plain containers "
            f"({type(error).__name__}). Ask for a checkpoint saved as a state dictionary."
        ) from None
    return _checked(path, dict(_flat(content)), hashlib.sha256(data).hexdigest())


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, Mapping):
        yield prefix.removeprefix("module."), content
        return
    for key, value in content.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _checked(path: str, values: Mapping[str, Any], sha256: str) -> Checkpoint:
    found: dict[str, dict[int, Tensor]] = {"image": {}, "text": {}}
    for key, value in values.items():
        if match := _PROMPTS.search(key):
            found[match[1]][int(match[2])] = _tensor(path, key, value, 4)
    means, covariances = (_tensor(path, n, _named(path, values, n), d) for n, d in (("means", 2), ("covars", 3)))
    learnt = _learnt(path, _named(path, values, "task_learnt"))
    blocks = {tower: tuple(by_layer[n] for n in sorted(by_layer)) for tower, by_layer in found.items()}
    prompts = [*blocks["image"], *blocks["text"]]
    shapes = {tower: {block.shape[2:] for block in t} for tower, t in blocks.items()}
    rows, embed_dim = means.shape
    problems = {
        "it has no prefix_pool of image_encoder or text_encoder": not prompts,
        "its blocks with prompts are not the first ones": any(sorted(f) != list(range(len(f))) for f in found.values()),
        "its prompts do not come as keys and values": any(p.shape[1] != 2 for p in prompts),
        "the prompts of one tower differ in length or width": any(len(s) > 1 for s in shapes.values()),
        "means and covars do not fit each other": covariances.shape != (rows, embed_dim, embed_dim),
        "its prompts and its statistics are not of the same number of tasks": any(len(p) != rows for p in prompts),
        f"task_learnt is {learnt}, and it has room for {rows} tasks": not 1 <= learnt <= rows,
    }
    for what, wrong in problems.items():
        if wrong:
            raise DataError(f"{path} is not a checkpoint of the DIKI authors' layout: {what}.")
    if not all(bool(torch.isfinite(t[:learnt]).all()) for t in (*prompts, means, covariances)):
        raise DataError(f"{path}: a learnt task has values that are not finite; the file is damaged.")
    return Checkpoint(
        {tower: tuple(b[:learnt].float() for b in t) for tower, t in blocks.items()},
        means[:learnt].double().numpy(),
        covariances[:learnt].double().numpy(),
        sha256,
    )


def _named(path: str, values: Mapping[str, Any], name: str) -> Any:
    for key, value in values.items():
        if key.rpartition(".")[2] == name:
            return value
    raise DataError(f"{path} is not a checkpoint of the DIKI authors' layout: it has no {name}.")


def _tensor(path: str, name: str, value: Any, dimensions: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != dimensions or not value.is_floating_point():
        raise DataError(f"{path}: {name} should be a floating point tensor of {dimensions} dimensions.")
    return value.detach()


def _learnt(path: str, value: Any) -> int:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise DataError(f"{path}: task_learnt should be a whole number.")
    return int(value)


def read_tasks(path: str) -> tuple[NamedTask, ...]:
    """Tasks in the order of training from a JSON list of {"name", "class_names", "templates"}.

    Raises:
        DataError: no such file, or not of this form.
    """
    form = 'a JSON list of {"name": …, "class_names": […], "templates": ["a photo of a {}."]}'
    try:
        tasks = [
            NamedTask(str(t["name"]), tuple(map(str, t["class_names"])), tuple(map(str, t["templates"])))
            for t in json.loads(read_bytes(path))
        ]
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; it should be {form}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} should be {form}: {type(error).__name__}: {error}.") from None
    for t in tasks:
        if not t.class_names or not t.templates or any(map(template_fault, t.templates)):
            raise DataError(f"{path}: task {t.name!r} needs class names, and templates with exactly one {{}} each.")
    if not tasks or len({t.name for t in tasks}) < len(tasks):
        raise DataError(f"{path}: it needs at least one task, and every task a name of its own.")
    return tuple(tasks)


def to_modules(checkpoint: Checkpoint, tasks: Sequence[NamedTask], backbone_digest: str) -> list[TaskModule]:
    """A module for each learnt task; tasks beyond those are not learnt yet and are left out.

    Raises:
        ConfigError: fewer tasks are named than were learnt.
    """
    if len(tasks) < checkpoint.num_tasks:
        raise ConfigError(f"the checkpoint has learnt {checkpoint.num_tasks} tasks and only {len(tasks)} are named.")
    source = {"format": "DIKI authors' task_N.pt", "sha256": checkpoint.sha256}
    return [
        TaskModule(
            key=module_key(imported=source, number=number, task=vars(task), backbone=backbone_digest),
            task=task.name,
            class_names=task.class_names,
            templates=task.templates,
            method="diki",
            parameters=checkpoint.parameters(number),
            moments=checkpoint.moments(number),
            validation_features=np.zeros((0, checkpoint.means.shape[1]), np.float16),
            provenance={
                "imported": source | {"task": number},
                "backbone": backbone_digest,
                "count": f"nominal ({NOMINAL_COUNT}): the file has covariances without the number of images",
                "method": checkpoint.method().model_dump(),
                "versions": {"diki_ray": diki_ray.__version__, "torch": torch.__version__},
            },
        )
        for number, task in enumerate(tasks[: checkpoint.num_tasks])
    ]


def import_checkpoint(checkpoint: Checkpoint, tasks: Sequence[NamedTask], config: Config) -> tuple[Entry, ...]:
    """Makes the checkpoint a run of the configuration's storage, with the configuration beside it, so that prediction
    and evaluation need nothing else. Importing the same file again changes nothing.

    Raises:
        ConfigError: a backbone of other sizes, or fewer names than tasks. UserError: the run has learnt other things.
    """
    by_task = config.routing.model_copy(update={"density": "task"})  # a checkpoint has no class means
    config = config.model_copy(update={"method": checkpoint.method(), "routing": by_task})
    backbone = load_backbone(config)
    build_method(config, backbone)  # refuses a depth that the towers do not have
    _check_sizes(checkpoint, backbone)
    modules = to_modules(checkpoint, tasks, backbone.digest())
    store = RunStore.open(config.run.storage, config.run.name)
    epoch = store.acquire(this_process("diki-ray import"), take_over=config.run.take_over)
    try:
        if others := {entry.key for entry in store.modules()} - {module.key for module in modules}:
            raise UserError(f"run {config.run.name!r} has {len(others)} modules from elsewhere: choose another name.")
        for module in modules:
            metadata = {"task": module.task, "num_classes": len(module.class_names), "method": module.method}
            store.commit_module(epoch, module.key, module.task, module.to_bytes(), metadata)
        store.put_document(epoch, CONFIG_DOCUMENT, config.to_yaml())
    finally:
        store.release(epoch)
    return store.modules()


def _check_sizes(checkpoint: Checkpoint, backbone: Backbone) -> None:
    sizes = {"embedding": (checkpoint.means.shape[1], backbone.embed_dim)}
    for tower in backbone.towers:
        if blocks := checkpoint.prompts[tower.name]:
            sizes[f"{tower.name} tower"] = (blocks[0].shape[3], tower.width)
    for what, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ConfigError(
                f"the checkpoint was learnt on a backbone whose {what} has {theirs} dimensions, that of "
                f"{backbone.name!r} has {ours}: choose the backbone it was learnt on (published: ViT-B-16, openai)."
            )
