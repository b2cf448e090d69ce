"""Everything that is wrong with a stored run: what its store finds (checksums, gaps, what is missing), and what a
module, a checkpoint or a document holds that no run writes, whatever checksum it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diki_ray.config import parse_stored
from diki_ray.config.yaml_text import read_tree
from diki_ray.errors import CorruptError, UserError
from diki_ray.learning.checkpoint_schema import check_checkpoint
from diki_ray.learning.module import TaskModule, read_tensors
from diki_ray.report.results import DOCUMENT
from diki_ray.report.results_schema import check_results
from diki_ray.store.library import module_path
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore
from diki_ray.store.upkeep import Problem

PARTS = "parts.json"
"""The document that says in how many parts the steps of the run are computed, written before anything is trained."""
MAX_PARTS = 2**16


def problems_of(store: RunStore) -> tuple[Problem, ...]:
    """Every problem of a run; none: what it holds can be read and means something."""
    found = list(store.verify())
    damaged = {problem.path for problem in found}
    for entry in store.modules():
        if (path := module_path(entry.digest)) in damaged:
            continue
        try:
            module = TaskModule.from_bytes(store.read_module(entry.digest))
        except UserError as error:
            found.append(Problem(path, f"module of task {entry.task!r}: {error}"))
            continue
        if module.key != entry.key:
            found.append(Problem(path, f"module of task {entry.task!r}: it was trained under the key {module.key!r}"))
    for path, blob in store.checkpoints.wholes():
        try:
            check_checkpoint(*read_tensors(blob))
        except UserError as error:
            found.append(Problem(path, str(error)))
    for name, check in _DOCUMENTS.items():
        where = f"{store.log.folder}/results/{name}"
        try:
            if where not in damaged and (document := store.get_document(name)) is not None:
                check(document, where)
        except UserError as error:
            found.append(Problem(where, str(error)))
    return tuple(found)


def check_parts(document: Any, where: str) -> int:
    """The number of parts that a run was begun with, from its parts.json.

    Raises:
        CorruptError: it says none.
    """
    number = document.get("num_parts") if isinstance(document, dict) else None
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_PARTS:
        raise CorruptError(f"{where} does not say in how many parts the run was begun: give train.num_parts.")
    return number


_DOCUMENTS: dict[str, Callable[[Any, str], Any]] = {
    CONFIG_DOCUMENT: lambda text, where: parse_stored(read_tree(text, where), source=where),
    DOCUMENT: check_results,
    PARTS: check_parts,
}
