"""Answers are written to one JSONL file or a folder of Parquet files, local or in object storage.

A JSONL file appears when it is whole. A Parquet folder is whole once it has `_SUCCESS`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from diki_ray.errors import ConfigError
from diki_ray.store.files import join, list_files, open_writer, scheme_of, write_bytes
from diki_ray.store.objects import Writer

FINISHED = "_SUCCESS"
ROWS_PER_FILE = 200_000


class Output(Protocol):
    """Takes rows as they come, in order."""

    def write(self, rows: pa.Table) -> None: ...


class JsonLines:
    """Writes one JSON object a line."""

    def __init__(self, file: Writer) -> None:
        self._file = file

    def write(self, rows: pa.Table) -> None:
        self._file.write(
            "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows.to_pylist()).encode()
        )


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    densities = row["log_densities"]
    return row | {"log_densities": None if densities is None else dict(densities)}


class ParquetFolder:
    """Writes part-00000.parquet and so on, each whole."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._tables: list[pa.Table] = []
        self._num_files = 0

    def write(self, rows: pa.Table) -> None:
        self._tables.append(rows)
        if sum(map(len, self._tables)) >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        if not self._tables:
            return
        data = io.BytesIO()
        pq.write_table(pa.concat_tables(self._tables), data)
        write_bytes(join(self._folder, f"part-{self._num_files:05d}.parquet"), data.getvalue())
        self._num_files += 1
        self._tables.clear()


def check(place: str) -> None:
    """Raises ConfigError for an output of no known kind, or one that is there already."""
    if not place.endswith((".jsonl", ".parquet")):
        raise ConfigError(f"--output {place}: name a file that ends in .jsonl, or a folder that ends in .parquet.")
    if scheme_of(place):
        parent, _, name = place.rpartition("/")
        taken = any(file == name or file.startswith(f"{name}/") for file in list_files(parent))
    else:
        taken = os.path.exists(place)
    if taken:
        raise ConfigError(f"--output {place} exists already: name another, or delete it first.")


@contextmanager
def open_output(place: str) -> Iterator[Output]:
    """Yields the output, which is finished when the block ends without an error. Raises StorageError if it cannot be
    written."""
    if place.endswith(".parquet"):
        folder = ParquetFolder(place)
        yield folder
        folder.flush()
        write_bytes(join(place, FINISHED), b"")
    else:
        with open_writer(place) as file:
            yield JsonLines(file)
