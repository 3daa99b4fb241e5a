"""The sampling command that a finished run prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from sdtune.backbone import Pretrained
from sdtune.commands.describe import backbone_overrides
from sdtune.config.build import build
from sdtune.config.compose import compose, search_path
from sdtune.config.settings import plain

SOURCES: list[dict[str, Any]] = [
    {"path": "pocket", "guidance": 3.0},
    {"path": "pocket", "guidance": 3.0, "prediction_type": "v_prediction", "zero_terminal_snr": True},
    {"path": "/models/my model", "guidance": 7.5},
    {"path": "somebody/model", "guidance": 5.0, "revision": "abc"},
]


@pytest.mark.parametrize("settings", SOURCES, ids=str)
def test_printed_overrides_select_the_same_backbone(settings: dict[str, Any], tmp_path: Path) -> None:
    overrides = backbone_overrides(Pretrained(**settings))
    assert bool(overrides) is (len(settings) > 2 or settings["path"] != "pocket")
    node = plain(compose("sample", search_path(None), [*shlex.split(overrides), "prompt=a fox"]))["backbone"]
    source = build(node)
    for key in ("path", "guidance", "revision", "prediction_type", "zero_terminal_snr"):
        assert getattr(source, key) == getattr(Pretrained(**settings), key), key
