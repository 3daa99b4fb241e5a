"""Read the offline files of W&B."""

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
    """Records of a finished run; waits until W&B's own process has written the end of the file."""
    deadline = time.monotonic() + 20
    while not (result := parsed(file)) or result[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "no exit record in 20 s"
        time.sleep(0.1)
    return result


def parsed(file: Path) -> list[Any]:
    """Records of a ``.wandb`` file: protobuf messages in LevelDB's log format after a header."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    result, message, offset = [], b"", 7
    while offset + _HEADER.size <= len(content):
        if _BLOCK - offset % _BLOCK < _HEADER.size:
            offset += _BLOCK - offset % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(content, offset)
        offset += _HEADER.size
        if offset + length > len(content):
            break  # the file is still being written
        message += content[offset : offset + length]
        offset += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            result.append(record)
            message = b""
    return result


def told(run: Path) -> dict[str, Any]:
    """Run facts, config, history and summary of one job."""
    [file] = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    result: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            result["run"] = record.run
            result["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "config":
            result["config"] |= {u.key: json.loads(u.value_json) for u in record.config.update}
        elif kind == "history":
            keys = ["/".join(item.nested_key) or item.key for item in record.history.item]
            values = [json.loads(item.value_json) for item in record.history.item]
            result["history"].append(dict(zip(keys, values, strict=True)))
        elif kind == "summary":
            for update in record.summary.update:
                result["summary"]["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        elif kind == "artifact":
            result["artifacts"].append(record.artifact.type)
        elif kind == "exit":
            result["exit"] = record.exit.exit_code
    return result
