"""Everything that is wrong with a stored run: what its store finds (checksums, gaps, what is missing), and what a
module or configuration holds that no run writes, whatever checksum it has."""

from __future__ import annotations

from diki_ray.config import parse_stored
from diki_ray.config.yaml_text import read_tree
from diki_ray.errors import UserError
from diki_ray.learning.module import TaskModule
from diki_ray.store.library import module_path
from diki_ray.store.run_store import CONFIG_DOCUMENT, Problem, RunStore


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
    where = f"{store.log.folder}/results/{CONFIG_DOCUMENT}"
    try:
        if (text := store.get_document(CONFIG_DOCUMENT)) is not None:
            parse_stored(read_tree(text, where), source=where)
    except UserError as error:
        found.append(Problem(where, str(error)))
    return tuple(found)
