"""What Weights & Biases wrote offline below a folder, read from its file: it has no reader of its own."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any


def wandb_records(root: Path) -> list[Any]:
    """The records of the one run there is, when it has been finished."""
    (file,) = root.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of its own writes the file, and ends a moment later
    while not any(r.WhichOneof("record_type") == "exit" for r in _records(file.read_bytes())):
        assert time.monotonic() < deadline, "the file was not finished"
        time.sleep(0.1)
    return _records(file.read_bytes())


def wandb_rows(records: list[Any]) -> list[dict[str, float]]:
    """What was logged, in order: name -> value."""
    return [
        {"/".join(i.nested_key) or i.key: float(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]


def _records(data: bytes) -> list[Any]:
    """The records of a transaction log: LevelDB's log format after a header of 7 bytes, a protobuf message each."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, position, parts = [], 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records
