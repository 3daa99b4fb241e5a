"""Hash of a backbone's weights: which changes of the files keep it, and which do not."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtune.backbone.weight_files import weight_files, weights_hash
from sdtune.errors import UserError


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {f"block.{i}.weight": torch.randn(3, 4 + i, generator=g) for i in range(6)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline folder with two components."""
    for component in ("unet", "vae"):
        (tmp_path / "pipe" / component).mkdir(parents=True)
    save_file(tensors(), tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_file({"w": torch.ones(5)}, tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors")
    return tmp_path / "pipe"


def hash_folder(folder: Path) -> str:
    return hash_components(folder, "unet", "vae")


def hash_components(folder: Path, *names: str) -> str:
    return weights_hash({name: weight_files(folder, name) for name in names})


def unet(folder: Path) -> Path:
    return folder / "unet/diffusion_pytorch_model.safetensors"


def shard(folder: Path) -> None:
    """Split the UNet into two shards with an index; the keys alternate between them."""
    weights = load_file(unet(folder))
    unet(folder).unlink()
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    for shard_number, name in enumerate(names):
        save_file(
            {k: v for i, (k, v) in enumerate(sorted(weights.items())) if i % 2 == shard_number}, folder / "unet" / name
        )
    index = {"metadata": {"total_size": 0}, "weight_map": {k: names[i % 2] for i, k in enumerate(sorted(weights))}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def reorder(folder: Path) -> None:
    """Write the same tensors by hand, with keys and bytes in another order."""
    header, body = {}, b""
    for key, value in sorted(load_file(unet(folder)).items(), reverse=True):
        data = value.numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(header).encode()
    unet(folder).write_bytes(struct.pack("<Q", len(head)) + head + body)
    assert load_file(unet(folder)).keys() == tensors().keys()


SAME: dict[str, Callable[[Path], object]] = {
    "another file name": lambda f: unet(f).rename(f / "unet/model.safetensors"),
    "shards": shard,
    "order": reorder,
    "metadata": lambda f: save_file(load_file(unet(f)), unet(f), {"note": "another", "format": "pt"}),
    "additional files": lambda f: (f / "unet/config.json").write_text("{}", encoding="utf-8"),
    "time": lambda f: os.utime(unet(f), (1, 1)),
}

OTHER: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a value": lambda t: t["block.5.weight"].view(-1)[-1].add_(1e-6),
    "a name": lambda t: t.update({"block.9.weight": t.pop("block.5.weight")}),
    "two names": lambda t: t.update({"block.0.weight": t["block.1.weight"], "block.1.weight": t["block.0.weight"]}),
    "a shape": lambda t: t.update({"block.0.weight": t["block.0.weight"].reshape(4, 3)}),
    "a type": lambda t: t.update({"block.0.weight": t["block.0.weight"].view(torch.int32)}),
    "one more": lambda t: t.update({"block.6.weight": torch.zeros(0)}),
    "one less": lambda t: t.pop("block.0.weight"),
}


@pytest.mark.parametrize("change", SAME)
def test_hash_ignores_changes_that_keep_the_weights(folder: Path, change: str) -> None:
    before = hash_folder(folder)
    SAME[change](folder)
    assert hash_folder(folder) == before


def test_copied_folder_has_the_same_hash(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert hash_folder(tmp_path / "copy") == hash_folder(folder)


@pytest.mark.parametrize("change", OTHER)
def test_hash_changes_with_the_weights(folder: Path, change: str) -> None:
    before = hash_folder(folder)
    changed = tensors()
    OTHER[change](changed)
    save_file(changed, unet(folder))
    assert hash_folder(folder) != before


def test_hash_changes_with_one_byte(folder: Path) -> None:
    before = hash_folder(folder)
    data = bytearray(unet(folder).read_bytes())
    data[-1] ^= 1
    unet(folder).write_bytes(data)
    assert hash_folder(folder) != before


def test_hash_depends_on_the_components_but_not_on_their_order(folder: Path) -> None:
    assert hash_components(folder, "vae", "unet") == hash_folder(folder)
    assert len({hash_folder(folder), hash_components(folder, "unet"), hash_components(folder, "vae")}) == 3
    a, b = folder / "unet", folder / "vae"
    before = hash_folder(folder)
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)
    assert hash_folder(folder) != before


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_file_is_refused_by_name(folder: Path, size: int) -> None:
    data = unet(folder).read_bytes()
    unet(folder).write_bytes(data[:size])
    with pytest.raises(UserError, match=rf"^{unet(folder)}: .*(truncated|copy or download)") as caught:
        hash_folder(folder)
    assert "\n" not in str(caught.value)


def test_file_of_another_format_is_refused_by_name(folder: Path) -> None:
    unet(folder).write_bytes(struct.pack("<Q", 10) + b"not a json header")
    with pytest.raises(UserError, match=rf"^{unet(folder)}: .*header cannot be read"):
        hash_folder(folder)


def test_component_without_weights_is_refused_by_name(folder: Path) -> None:
    unet(folder).unlink()
    with pytest.raises(UserError, match=r"backbone\.path: .*/unet contains no diffusion_pytorch_model\.safetensors"):
        hash_folder(folder)


def test_hash_is_cached_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    first, state = hash_folder(folder), unet(folder).stat()
    data = bytearray(unet(folder).read_bytes())
    data[-1] ^= 1
    unet(folder).write_bytes(data)
    os.utime(unet(folder), ns=(state.st_atime_ns, state.st_mtime_ns))
    assert hash_folder(folder) == first, "a file with unchanged size and modification time is not read again"
    os.utime(unet(folder), ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert hash_folder(folder) != first
