"""A few generated configurations and damaged files; ``make fuzz`` tries thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import configurations, files
from fuzz.world import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("fuzz") / "world")


def test_configurations_get_one_line_or_run(world: World) -> None:
    assert configurations.search(world, seed=3, count=8, runs=1) == []


def test_damaged_files_are_read_or_refused(world: World) -> None:
    assert files.search(world, seed=3, count=1) == []


def test_problem_of_a_command_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    case = configurations.Case("sample", ("prompt=a", "hardware=cpu"))

    def broken(*_: object) -> None:
        raise KeyError("hardware")

    monkeypatch.setattr(configurations, "main", broken)
    outcome = configurations.check(case, world.root.parent / "output")
    assert outcome.problem is not None
    assert "KeyError: 'hardware'" in outcome.problem
    assert "KeyError: 'hardware'" in (configurations.run(case, world.root.parent / "output").problem or "")


def test_problem_of_a_reader_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise ZeroDivisionError

    def greedy(folder: Path) -> None:
        bytearray(3 * 2**30)

    for read, error in ((broken, "ZeroDivisionError"), (greedy, "MemoryError")):
        reader = files.Reader(world.images, ("0.txt",), read)
        monkeypatch.setattr(files, "readers", lambda world, reader=reader: {"images": reader})
        problems = files.search(world, seed=0, count=1)
        assert len(problems) == 2
        assert all(error in problem for _, problem in problems)
