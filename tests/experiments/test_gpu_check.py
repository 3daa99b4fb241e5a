"""Check of a GPU (make gpu-check), as far as it runs without one."""

from __future__ import annotations

import json
import math
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.gpu import check, page, plans, processes, report
from experiments.gpu.configurations import CARDS, SPEED, WAITS, planned_settings, that_fits
from experiments.gpu.values import compared
from sdtune.errors import UserError

FOLDER = Path(page.__file__).parent
MACHINE = {"gpu": "X", "gib": 24.0, "capability": "8.9", "cpus": 8, "torch": "2", "cuda": "13", "diffusers": "1"}


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    check.main()


# --- page


def test_page_has_a_table_for_each_check() -> None:
    step = {"step_ms": 1234.5, "host_ms": 20.0, "peak_gib": 3.0, "reserved_gib": 3.5}
    rows = [
        {"check": "methods", "name": "lora", "ok": True, "worst_relative_difference": 2.5e-6, "gpu": {}, "cpu": {}},
        {"check": "waits", "name": "A", "ok": True, "steps": 2, "waits": {}},
        {"check": "waits", "name": "B", "ok": False, "steps": 2, "waits": {"methods/base.py:7": 4}},
        {"check": "speed", "name": "A", "ok": True, **step, "planned_gib": 3.2, "peak_of_planned": 0.94},
        {"check": "speed", "name": "B", "skipped": "3 s are left"},
        {"check": "resume", "name": "C", "ok": False, "error": "exit code 1: a | b\nc"},
    ]
    text = "\n".join(page.lines({"machine": MACHINE, "seconds": 12.0, "rows": rows}))
    assert "X (24.0 GiB, compute capability 8.9), 8 CPU cores" in text
    assert "| lora | yes | 2.5e-06 |" in text
    assert "| A | yes | 2 | none |" in text
    assert "| B | **no** | 2 | methods/base.py:7 (4) |" in text
    assert "| A | yes | 1,234.5 | 20.0 | 3.00 | 3.50 | 3.20 | 0.94 |" in text
    assert "| B | not measured: 3 s are left |" in text
    assert "| C | **no** exit code 1: a \\| b c |" in text
    assert "Sampling" not in text


def test_page_keeps_its_text_around_the_tables(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text((FOLDER / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    results = {"machine": MACHINE, "seconds": 1.0, "rows": [{"check": "resume", "name": "C", "ok": True}]}
    (tmp_path / "gpu.json").write_text(json.dumps(results), encoding="utf-8")
    page.write(tmp_path / "gpu.json", tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# sdtune on a GPU\n")
    assert "| C | yes |" in text
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results


def test_every_check_is_on_the_page() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert list(page.TABLES) == list(check.CHECKS)
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(check.CHECKS)


# --- rows and budget


def test_each_row_is_written_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    now = 0.0
    rows = report.Report(tmp_path, MACHINE, report.Budget(10, clock=lambda: now))
    written: list[int] = []

    def measure(seconds: float, outcome: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        nonlocal now
        now += seconds
        file = tmp_path / report.RESULTS
        written.append(len(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.is_file() else 0)
        return outcome()

    def fail(error: Exception) -> dict[str, Any]:
        raise error

    outcomes: list[tuple[float, Callable[[], dict[str, Any]]]] = [
        (2, lambda: {"step_ms": math.nan}),
        (3, lambda: fail(ValueError("wrong"))),
        (1, lambda: fail(processes.MeasurementFailed("exit code 1: no"))),
        (1, lambda: fail(report.Skipped("no checkout"))),
        (4, lambda: {"ok": False}),
        (3, dict),
    ]
    measurements = [
        report.Measurement(str(number), seconds, partial(measure, seconds, outcome))
        for number, (seconds, outcome) in enumerate(outcomes)
    ]
    rows.run("speed", measurements)
    assert written == [0, 1, 2, 3, 5]
    content = json.loads((tmp_path / report.RESULTS).read_text(encoding="utf-8"))
    assert content["machine"] == MACHINE
    outcomes_written = [
        {k: v for k, v in row.items() if k not in ("check", "name", "seconds")} for row in content["rows"]
    ]
    assert outcomes_written == [
        {"ok": True, "step_ms": "nan"},
        {"ok": False, "error": "ValueError: wrong"},
        {"ok": False, "error": "exit code 1: no"},
        {"skipped": "no checkout"},
        {"skipped": "3 s are left, it takes up to 4 s"},
        {"ok": True},
    ]


def test_values_are_compared_relative_to_the_cpu() -> None:
    reference = {"loss": [0.5, 0.25], "grad_norm": [1.0, 2.0]}
    row = compared({"loss": [0.5, 0.2501], "grad_norm": [1.0, 2.0]}, reference)
    assert row["ok"]
    assert row["worst_relative_difference"] == pytest.approx(4e-4)
    assert not compared({"loss": [0.5, 0.25], "grad_norm": [1.0, 2.01]}, reference)["ok"]
    assert not compared({"loss": [0.5, math.nan], "grad_norm": [1.0, 2.0]}, reference)["ok"]


# --- command


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_machine_without_a_gpu_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--out", tmp_path / "out")
    assert stop.value.code == "gpu check: torch has no GPU; run sdtune doctor, which shows the reason"
    assert not (tmp_path / "out").exists()


def test_unknown_check_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--only: unknown check sped; did you mean speed"):
        run_main(monkeypatch, "--out", tmp_path / "out", "--only", "methods,sped")


def test_checks_keep_their_order() -> None:
    assert check.selected("resume,methods") == ["methods", "resume"]
    assert check.selected("")[:3] == ["methods", "waits", "speed"]


# --- configurations


def test_every_training_can_be_planned_without_weights(tmp_path: Path) -> None:
    settings = planned_settings(tmp_path)
    assert len(SPEED) == 12
    assert len(settings) == len(SPEED) + 1 + len(CARDS)
    assert set(WAITS) < settings.keys()
    for name, overrides in settings.items():
        job = plans.checked(overrides)
        assert job.side == (1024 if name.removeprefix("12 GiB: ").startswith("SDXL") or "24 GiB" in name else 512), name
        assert job.gpu


@pytest.mark.slow
@pytest.mark.parametrize("name", planned_settings(Path()))
def test_plan_of_every_training_is_counted(name: str, tmp_path: Path) -> None:
    plan = plans.planned(planned_settings(tmp_path)[name])
    assert 1 < plan["step"] <= plan["peak"]
    for card in (card for card in CARDS if card.name == name):
        assert plan["fits"] <= card.gib


def test_quantized_lora_replaces_full_training_that_does_not_fit() -> None:
    full = SPEED[-1]
    assert full.instead is not None
    sizes = {full.name: 41.0, full.instead.name: 8.0}
    plan = {name: plans.Plan(step=gib, peak=gib, fits=gib) for name, gib in sizes.items()}
    assert that_fits(full, plan, 80) is full
    assert that_fits(full, plan, 24) is full.instead
    assert that_fits(full, plan, 6) is None


def test_random_weights_have_the_scale_of_an_initialization() -> None:
    from experiments.gpu.weights import random_weights

    with torch.device("meta"):
        shapes = {
            "linear.weight": torch.empty(1500, 1000),
            "conv.weight": torch.empty(64, 32, 3, 3),
            "norm.weight": torch.empty(8),
            "norm.bias": torch.empty(8),
            "position_ids": torch.empty(1, 77, dtype=torch.int64),
        }
    weights = random_weights(shapes)
    assert {name: weight.shape for name, weight in weights.items()} == {n: shape.shape for n, shape in shapes.items()}
    assert weights["linear.weight"].dtype == torch.float16
    assert weights["linear.weight"].float().std() == pytest.approx(1000**-0.5, rel=0.02)
    assert weights["conv.weight"].float().std() == pytest.approx((32 * 9) ** -0.5, rel=0.05)
    assert weights["norm.weight"].tolist() == [1.0] * 8
    assert weights["norm.bias"].tolist() == [0.0] * 8
    assert weights["position_ids"].tolist() == [list(range(77))]


# --- processes


def test_functions_of_processes_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")]
    names = [name for source in sources for name in re.findall(r'"(experiments\.gpu\.\w+:\w+)"', source)]
    names += ["experiments.gpu.speed:limited", "experiments.gpu.throughput:script_steps", processes.COMMAND]
    assert len(names) >= 7
    assert all(callable(pkgutil.resolve_name(name)) for name in names)


def test_process_of_the_check_and_its_server_import_no_library_that_uses_the_gpu() -> None:
    code = f"""
import importlib, sys
for name in {["experiments.gpu.check", *processes.PRELOADED]}:
    importlib.import_module(name)
print([name for name in ("bitsandbytes", "diffusers", "peft") if name in sys.modules])
"""
    root = FOLDER.parents[1]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
    assert output == "[]\n"


@pytest.mark.slow
def test_failure_of_a_process_is_one_line(tmp_path: Path) -> None:
    def run(target: str, *arguments: object, limit: float = 60) -> None:
        log = tmp_path / "logs" / "log"
        processes.start(target, *arguments, log=log, limit=limit, environment={"GPU_CHECK_TEST": "7"}).wait()

    run("subprocess:check_call", ["sh", "-c", "test $GPU_CHECK_TEST = 7"])
    with pytest.raises(processes.MeasurementFailed, match=r"^exit code 1: ValueError: .*$"):
        run("math:sqrt", -1.0)
    with pytest.raises(processes.MeasurementFailed, match=r"^stopped after 1 s; see log$"):
        run("time:sleep", 60, limit=1)


def test_page_is_refused_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gpu\.json cannot be read"):
        page.write(tmp_path / "gpu.json", tmp_path)
