"""Download of models: what is asked of the hub, and in which order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from caption_models import build_blip, build_tagger
from sdtune.captioning.models import check_model_name, locate_model
from sdtune.errors import UserError


def use_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Serve ``model`` as every hub id; returns the names of the files that each request downloads."""
    requests: list[list[str]] = []
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(name: str, allow_patterns: Sequence[str]) -> str:
        allowed = [f for f in sorted(model.iterdir()) if any(fnmatch(f.name, pattern) for pattern in allow_patterns)]
        requests.append([file.name for file in allowed])
        for file in allowed:
            shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return requests


def test_hub_model_is_downloaded_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_blip(tmp_path / "model")
    for name in ("code.py", "pytorch_model.bin", "README.md", "vocab.txt"):
        (model / name).write_text("x", encoding="utf-8")
    requests = use_hub(model, tmp_path, monkeypatch)
    check_model_name("somebody/blip", "caption")
    assert requests == []
    assert (locate_model("somebody/blip", "caption") / "model.safetensors").is_file()
    assert requests[0] == ["config.json"]
    assert {"model.safetensors", "tokenizer.json", "vocab.txt"} <= set(requests[1])
    assert not {"code.py", "pytorch_model.bin", "README.md"} & set(requests[1])


def test_hub_tagger_is_downloaded_without_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tagger(tmp_path / "model")
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "model.safetensors").touch()
    requests = use_hub(model, tmp_path, monkeypatch)
    locate_model("somebody/tagger", "caption")
    assert requests == [["config.json", "selected_tags.csv"], ["model.onnx", "selected_tags.csv"]]


def test_weights_of_an_unsupported_hub_model_are_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_blip(tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"auto_map": {}, "model_type": "florence2"}), encoding="utf-8")
    requests = use_hub(model, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"^model: somebody/florence needs Python code of its author"):
        locate_model("somebody/florence", "caption")
    assert requests == [["config.json"]]


def test_hub_model_that_cannot_be_downloaded_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: Sequence[str]) -> str:
        raise OSError("no connection\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"^model: a/b is not a local folder and cannot be .* \(no connection\)$"):
        locate_model("a/b", "mask")


def test_name_that_is_neither_a_folder_nor_a_hub_id_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model: /nowhere is not a folder; set a local folder with a model, or a hub"):
        check_model_name("/nowhere", "caption")


def test_tagger_makes_no_masks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no model"):
        check_model_name(str(build_tagger(tmp_path / "tagger")), "mask")
