"""Cache of latents and text embeddings: keyed by content, written atomically."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdtune.data.cache import MEMORY_CACHE_BYTES, TensorCache, keys_of_rank
from sdtune.errors import UserError


def test_stored_tensor_is_read_back(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "a" / "b")
    value = torch.randn(3, 4).t()  # not contiguous
    assert "key" not in cache
    cache.put("key", {"states": value, "mask": value > 0})
    assert "key" in cache
    read = TensorCache(tmp_path / "a" / "b").get("key")
    assert torch.equal(read["states"], value)
    assert torch.equal(read["mask"], value > 0)
    assert "another" not in cache


def test_every_key_has_a_separate_file_below_the_folder(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    keys = ["", "a/b", "../a", "a\0b", "é" * 500, "a", "A"]
    for i, key in enumerate(keys):
        cache.put(key, {"x": torch.tensor([i])})
    assert [int(cache.get(key)["x"]) for key in keys] == list(range(len(keys)))
    assert all(path.is_relative_to(tmp_path) for path in map(cache.path, keys))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not safetensors at all"])
def test_error_for_damaged_entry_names_its_file(tmp_path: Path, damage) -> None:
    cache = TensorCache(tmp_path)
    cache.put("key", {"x": torch.randn(64)})
    cache.path("key").write_bytes(damage(cache.path("key").read_bytes()))
    with pytest.raises(UserError, match=rf"^{cache.path('key')}: damaged cache entry .*delete this file") as caught:
        cache.get("key")
    assert "\n" not in str(caught.value)


def encode(items: Sequence[str]) -> list[dict[str, Tensor]]:
    return [{"x": torch.tensor([float(len(item))])} for item in items]


def test_batches_with_missing_items_are_encoded_completely(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    calls: list[list[str]] = []
    done: list[int] = []

    def recorded(items: Sequence[str]) -> list[dict[str, Tensor]]:
        calls.append(list(items))
        return encode(items)

    cache.fill({"k1": "a"}, recorded, batch_size=2)
    items = {f"k{i}": "a" * i for i in range(1, 6)}
    cache.fill(items, recorded, batch_size=3, progress=done.append)
    # The first batch is the same as without the stored item, so that the values of the others are the same too.
    assert calls == [["a"], ["a", "aa", "aaa"], ["aaaa", "aaaaa"]]
    assert done == [2, 2]
    assert [float(cache.get(key)["x"]) for key in items] == [1, 2, 3, 4, 5]
    cache.fill(items, recorded, batch_size=3)
    assert len(calls) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_output_that_is_not_finite_is_refused_and_not_stored(tmp_path: Path, value: float) -> None:
    cache = TensorCache(tmp_path)

    def broken(items: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{"y": torch.tensor([value if item == "bad.png" else 1.0]), "z": torch.ones(1)} for item in items]

    with pytest.raises(UserError, match=r"^bad\.png: .*not finite"):
        cache.fill({"g": "good.png", "b": "bad.png"}, broken, batch_size=2)
    assert "g" in cache
    assert "b" not in cache


def test_encoder_with_too_few_outputs_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        TensorCache(tmp_path).fill({"a": "a", "b": "b"}, lambda items: encode(items[:1]), batch_size=2)


def test_shares_of_the_processes_partition_the_keys() -> None:
    keys = [f"k{i}" for i in range(7)]
    shares = [keys_of_rank(keys, rank, 3) for rank in range(3)]
    assert sorted(key for rank_keys in shares for key in rank_keys) == keys
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_threads_that_write_the_same_entry_leave_one_complete_file(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    value = torch.arange(50_000.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.put("key", {"x": value}), range(64)))
    assert torch.equal(cache.get("key")["x"], value)
    assert [path.name for path in cache.path("key").parent.iterdir()] == [cache.path("key").name]


@pytest.mark.slow
def test_processes_that_write_the_same_entry_leave_one_complete_file(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from sdtune.data.cache import TensorCache\n"
        "cache = TensorCache(Path(sys.argv[1]))\n"
        "for _ in range(10):\n"
        "    cache.put('key', {'x': torch.arange(50_000.0)}); assert cache.get('key')['x'][-1] == 49_999\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    cache = TensorCache(tmp_path)
    assert torch.equal(cache.get("key")["x"], torch.arange(50_000.0))
    assert [path.name for path in cache.path("key").parent.iterdir()] == [cache.path("key").name]


def test_failed_write_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path)

    def fail_halfway(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        cache.put("key", {"x": torch.zeros(1)})
    assert "key" not in cache
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_tensors_in_memory_are_limited_by_bytes(tmp_path: Path) -> None:
    """Each entry has a quarter of the limit, so four of six entries stay in memory: those that were read last."""
    cache = TensorCache(tmp_path)
    for key in "abcdef":
        cache.put(key, {"x": torch.zeros(MEMORY_CACHE_BYTES // 32), "y": torch.zeros(MEMORY_CACHE_BYTES // 32)})
        assert cache.get(key)["x"].sum() == 0
    for key in "abcdef":
        cache.path(key).unlink()
    assert [key for key in "fedcba" if readable(cache, key)] == list("fedc")


def readable(cache: TensorCache, key: str) -> bool:
    try:
        cache.get(key)
    except FileNotFoundError:
        return False
    return True
