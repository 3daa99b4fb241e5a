"""W&B's offline files, read back."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 2**15, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


def records(file: Path) -> list[Any]:
    """Of a run that is over; W&B's own process writes the end of its file, a moment after the run's."""
    until = time.monotonic() + 20
    while not (found := parsed(file)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < until, "no end in 20 s"
        time.sleep(0.1)
    return found


def parsed(file: Path) -> list[Any]:
    """Of a ``.wandb`` file: protobuf messages in LevelDB's log format, behind a header of its own."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    found, whole, at = [], b"", 7
    while at + _HEADER.size <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        if at + length > len(content):
            break  # it is still being written
        whole += content[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def told(run: Path) -> dict[str, Any]:
    """Of one job: the run's facts, config, history and summary."""
    [file] = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "config":
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.config.update}
        elif kind == "history":
            keys = ["/".join(item.nested_key) or item.key for item in record.history.item]
            values = [json.loads(item.value_json) for item in record.history.item]
            found["history"].append(dict(zip(keys, values, strict=True)))
        elif kind == "summary":
            for update in record.summary.update:
                found["summary"]["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact.type)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
