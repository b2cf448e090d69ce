"""What a task leaves behind: its trained parameters, its Gaussian, its classes. Immutable once committed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from diki_ray.errors import ConfigError, CorruptError
from diki_ray.json_text import parsed
from diki_ray.learning.exemplars import Exemplars
from diki_ray.learning.module_schema import check_header, check_tensors
from diki_ray.learning.moments import Moments
from diki_ray.learning.statistics import Statistics

FORMAT = 2
"""1 had moments alone, 2 has sums by class from which they follow. Both are read; of what has no sums by class
(modules of before, imported checkpoints) 1 is written."""
NUM_VALIDATION_FEATURES = 64
"""Frozen features of validation images kept with a module (fp16, 64 KiB at E = 512): enough to place `validated`
calibration under any ε and shrinkage, and a ViT-B/16 module stays below 1.8 MB."""


@dataclass(frozen=True, eq=False)
class TaskModule:
    """One task's trained parameters with its statistics and provenance.

    parameters: float32 arrays by name (`image.layer0.keys` …), whatever the method trains;
    moments: of the frozen image features of its training images; `statistics`, where there are any, hold them and
        those of each class;
    validation_features: float16 [M, E], M ≤ NUM_VALIDATION_FEATURES;
    provenance: everything the module key is made of, training history, versions: JSON values;
    exemplars: images of the task that are trained on again beside later ones, where a run replays.
    """

    key: str
    task: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    method: str
    parameters: dict[str, np.ndarray]
    moments: Moments
    validation_features: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)
    statistics: Statistics | None = None
    exemplars: Exemplars | None = None

    def with_exemplars(self, exemplars: Exemplars | None, said: dict[str, Any] | None = None) -> TaskModule:
        """The same module with these exemplars, or with none; `said` is added to its provenance."""
        return replace(self, exemplars=exemplars, provenance=self.provenance | (said or {}))

    @property
    def class_statistics(self) -> Statistics:
        """The sums by class.

        Raises:
            ConfigError: a module of a former version has none.
        """
        if self.statistics is None:
            raise ConfigError(
                f"the module of task {self.task!r} has no class means, because a former version made it or it was "
                "imported: fill them in with `diki-ray store fill`, which reads its training images once, or use "
                "routing.density=task."
            )
        return self.statistics

    @cached_property
    def digest(self) -> str:
        """sha256 of the module's bytes, as the store names its blob."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """One safetensors blob; the same module gives the same bytes."""
        tensors = {f"parameters/{name}": value for name, value in sorted(self.parameters.items())}
        if self.statistics is None:
            tensors["moments/mean"] = self.moments.mean
            tensors["moments/scatter_packed"] = self.moments.packed()
        else:
            tensors |= {f"statistics/{name}": value for name, value in self.statistics.tensors().items()}
        tensors["validation_features"] = self.validation_features.astype(np.float16)
        if self.exemplars is not None:
            tensors |= {f"exemplars/{name}": value for name, value in self.exemplars.tensors().items()}
        header = {
            "format": 1 if self.statistics is None else FORMAT,
            "key": self.key,
            "task": self.task,
            "class_names": self.class_names,
            "templates": self.templates,
            "method": self.method,
            "count": self.moments.count,
            "provenance": self.provenance,
        }
        return write_tensors(header, tensors)

    @staticmethod
    def from_bytes(blob: bytes) -> TaskModule:
        """Raises CorruptError when the blob is not a module."""
        try:
            header, tensors = read_tensors(blob)
            check_header(header)
            check_tensors(tensors)
            statistics = None
            if header["format"] == 1:
                moments = Moments.unpacked(header["count"], tensors["moments/mean"], tensors["moments/scatter_packed"])
            elif header["format"] == FORMAT:
                statistics = Statistics.from_tensors(_below("statistics", tensors))
                moments = statistics.moments
                if len(statistics.counts) != len(header["class_names"]) or moments.count != header["count"]:
                    raise ValueError("its statistics are of other classes or images than its header says")
            else:
                raise ValueError(f"format {header['format']} is of a later version; this one reads 1 and {FORMAT}")
            remembered = _below("exemplars", tensors)
            return TaskModule(
                key=header["key"],
                task=header["task"],
                class_names=tuple(header["class_names"]),
                templates=tuple(header["templates"]),
                method=header["method"],
                parameters=_below("parameters", tensors),
                moments=moments,
                validation_features=tensors["validation_features"],
                provenance=header["provenance"],
                statistics=statistics,
                exemplars=Exemplars.from_tensors(remembered, len(header["class_names"])) if remembered else None,
            )
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise CorruptError(f"these bytes are not a task module: {error}") from error


def _below(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def write_tensors(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors blob with one JSON header: how modules, checkpoints and caches are stored."""
    # One metadata value: safetensors may order several keys differently from one process to the next.
    return save(tensors, metadata={"diki_ray": json.dumps(header, sort_keys=True)})


def read_tensors(blob: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of a safetensors blob written here."""
    length = int.from_bytes(blob[:8], "little")
    try:
        metadata = parsed(blob[8 : 8 + length])["__metadata__"]
        return parsed(metadata["diki_ray"]), load(blob)
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise CorruptError(f"these bytes are not a safetensors file of diki_ray: {error}") from error


def module_key(**depends_on: Any) -> str:
    """The hash of everything a module depends on, known before it is trained.

    depends_on: JSON values (backbone digest, data digest, class names, template, hyperparameters, seed, configured
    world size, method and its version, predecessor's key where the method has one).
    """
    text = json.dumps(depends_on, sort_keys=True, separators=(",", ":"), default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()


def task_seed(seed: int, data_digest: str) -> int:
    """The task's own seed: from (seed, data digest), never from its position in the stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{data_digest}".encode()).digest()[:8], "little") >> 1
