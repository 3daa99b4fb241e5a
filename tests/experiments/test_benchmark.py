"""Benchmark (make bench): gate, clock and generated page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from running import arguments

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmark"


def test_gate_accepts_equal_work_and_refuses_other_noise(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.benchmark import gate
    from experiments.benchmark.commands import Shape

    monkeypatch.setattr(gate, "TOLERANCE", 1e-4)  # a random model is less well conditioned than a trained one
    differences = gate.gate(Shape("tiny", tiny, 32))
    assert list(differences) == ["lora", "textual_inversion", "dreambooth", "full", "controlnet"]
    monkeypatch.setattr(gate, "drawn", lambda stream, shape, original=gate.drawn: original(stream, shape) * 1.001)
    with pytest.raises(RuntimeError, match="gate: lora differs from plain diffusers by"):
        gate.gate(Shape("tiny", tiny, 32))


@pytest.mark.slow
@pytest.mark.parametrize("watch", ["time", "count"])
def test_clock_records_the_steps_of_a_training(watch: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.json"
    overrides = arguments(tiny, images, tmp_path / "run", "trainer.max_steps=1000")
    command = [sys.executable, str(FOLDER / "clock.py"), watch, "5", str(out), "sdtune", "train", *overrides]
    start = time.monotonic()
    environment = os.environ | {"BENCH_BEGAN": repr(start)}
    assert subprocess.run(command, env=environment, timeout=240, check=False).returncode == 0
    metrics = json.loads(out.read_text(encoding="utf-8"))
    if watch == "count":
        assert metrics["operators"] > 1000
        assert metrics["flop"] > 1e6
    assert len(metrics["ends"]) == 5
    assert metrics["ends"] == sorted(metrics["ends"])
    assert metrics["ends"][-1] < time.monotonic() - start
    assert not (tmp_path / "run" / "artifact").exists(), "the process exits after the last step"


def test_clock_refuses_parameters_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.benchmark import clock

    monkeypatch.setenv("BENCH_BEGAN", "0")
    weight = torch.nn.Parameter(torch.tensor([1.0, math.inf]))
    with pytest.raises(FloatingPointError, match="not finite after 1 steps"):
        clock.watched(1, tmp_path / "seen.json", False)(torch.optim.SGD([weight]))
    assert not (tmp_path / "seen.json").exists()


def test_page_has_ratios_of_medians_and_marks_missed_aims() -> None:
    from experiments.benchmark.page import page

    machine = {"processor": "X", "cores": 2, "torch": "2", "diffusers": "1", "multiplies bfloat16": []}

    def figures(step: float) -> dict[str, Any]:
        return {
            "step_seconds": [step, step, 9.0], "first_step_seconds": [1.0] * 3, "peak": [2**20] * 3,
            "operators": 7, "synchronisations": 0, "flop": 1e12,
        }  # fmt: skip

    def way(loop: float) -> dict[str, list[float]]:
        return {"loop_seconds": [loop] * 3, "wall_seconds": [2 * loop] * 3}

    assert "Nothing has been measured" in page({})
    text = page(
        {
            "gate": {"lora": {"loss": 1e-7, "gradients": 3e-6}, "machine": machine},
            "pocket/lora/32-true": {
                "sdtune": figures(0.3), "diffusers": figures(0.5), "rate": 2.0, "machine": machine,
            },
            "sd15/textual_inversion/bf16-mixed": {
                "sdtune": figures(0.3), "does not run": {"diffusers": "RuntimeError: of two types"}, "rate": 2.0,
                "machine": machine,
            },
            "floor/lora/32-true": {
                "sdtune": figures(2.0), "rate": 1.0, "machine": machine, "earlier": "steps became faster",
            },
            "sweep/4/32-true": {
                "one after another": way(8.0), "two processes at once": way(6.0), "shared backbone": way(2.0),
                "largest difference": 2e-5, "machine": machine,
            },
        }
    )  # fmt: skip
    assert "within 3e-06" in text
    assert "Measured before steps became faster, and not repeated since: floor/lora/32-true.\n" in text
    assert "Not measured yet: imports, pocket/lora/bf16-mixed, pocket/textual_inversion/32-true, " in text
    assert "pocket/lora/32-true" not in text.partition("Not measured yet: ")[2].partition(".\n")[0]
    assert (
        "\n\nNot compared: diffusers, because the script for textual_inversion fails here in bf16-mixed"
        " (`RuntimeError: of two types`).\n" in text
    )
    assert "were not measured" not in text
    assert "| lora | 32-true | sdtune | 300 (300-9,000) | 0.60 |" in text
    assert "| lora | 32-true | 0.60 missed | 0.5 | 0.60 met | 1.00 met |  | 1.00 missed | at once |" in text
    assert "| 167% |" in text, "1 TFLOP in 0.3 s, relative to 2 TFLOP/s"
    assert "| 4 | 32-true | shared backbone | 2.0 (2.0-2.0) | 0.25 | 0.32 | 4.0 (4.0-4.0) | 0.25 | 0.35 |" in text
    assert (
        "in 32-true: 50% of the matrix rate, which was 1.00 TFLOP/s on the same cores in the same run (aim 40%)" in text
    )
    assert "2e-05 (batch 4, 32-true)" in text
    assert "| textual_inversion | bf16-mixed | 0" not in text


def test_page_compares_warm_caches_and_kohyas_script() -> None:
    from experiments.benchmark.page import KOHYA, page

    machine = {"processor": "X", "cores": 2, "torch": "2", "diffusers": "1", "multiplies bfloat16": []}

    def figures(step: float, start: float, peak: int) -> dict[str, Any]:
        work = {"operators": 7, "synchronisations": 0, "flop": 1e12}
        return {"step_seconds": [step], "first_step_seconds": [start], "peak": [peak], **work}

    group = {
        "sdtune": figures(0.6, 12.0, 100), "sdtune, warm caches": figures(0.6, 9.0, 100),
        "diffusers": figures(1.0, 10.0, 100), KOHYA: figures(0.8, 6.0, 200), "rate": 2.0, "machine": machine,
    }  # fmt: skip
    text = page({"sd15/lora/32-true": group})
    assert "| lora | 32-true | 0.60 missed | 0.55 | 0.60 met | 1.20 missed | 0.90 met | 1.00 missed | 5 |" in text
    assert "| lora | 32-true | 0.75 missed | 2.00 | 1.50 | 0.50 |" in text
    assert f"| lora | 32-true | {KOHYA} | 800 (800-800) | 0.80 | 6.0 (6.0-6.0) | 0.60 |" in text


def test_kohya_checkout_and_its_environment_are_checked(tmp_path: Path) -> None:
    from experiments.benchmark.bench import checked_peers

    assert checked_peers(None, None).kohya is None
    with pytest.raises(SystemExit, match=r"--kohya: .* has no file train_network\.py; use a checkout of sd-scripts"):
        checked_peers(None, tmp_path)
    (tmp_path / "train_network.py").touch()
    with pytest.raises(SystemExit, match="does not exist; run make bench KOHYA="):
        checked_peers(None, tmp_path)
    with pytest.raises(SystemExit, match="--peer: .* has no folder named examples"):
        checked_peers(tmp_path, None)


@pytest.mark.parametrize(
    ("start", "step", "expected"), [(3.0, 1.0, "2"), (3.0, 2.5, "never"), (0.5, 1.0, "at once"), (0.5, 2.25, "until 2")]
)
def test_page_states_after_how_many_steps_sdtune_is_ahead(start: float, step: float, expected: str) -> None:
    from experiments.benchmark.page import ahead

    ours = {"first_step_seconds": [start], "step_seconds": [step]}
    assert ahead(ours, {"first_step_seconds": [1.0], "step_seconds": [2.0]}) == expected


def test_page_has_a_fixed_order_and_lists_the_groups_of_each_machine() -> None:
    from experiments.benchmark.page import groups, page

    one = {"processor": "X", "cores": 2, "torch": "2", "diffusers": "1", "multiplies bfloat16": ["amx_bf16"]}
    figures = {
        "step_seconds": [1.0], "first_step_seconds": [1.0], "peak": [1], "operators": 7, "synchronisations": 0,
        "flop": 1e12,
    }  # fmt: skip
    group = {"sdtune": figures, "diffusers": figures, "rate": 2.0}
    results = {
        "sd15/full/32-true": {**group, "machine": one},
        "sd15/lora/bf16-mixed": {**group, "machine": one | {"processor": "Y"}},
        "sd15/lora/32-true": {**group, "machine": one},
    }
    text = page(results)
    assert "- X, 2 cores, torch 2, diffusers 1, bfloat16 by amx_bf16: sd15/lora/32-true, sd15/full/32-true.\n" in text
    assert "- Y, 2 cores, torch 2, diffusers 1, bfloat16 by amx_bf16: sd15/lora/bf16-mixed.\n" in text
    rows = [text.index(f"| {row} | sdtune |") for row in ("lora | 32-true", "lora | bf16-mixed", "full | 32-true")]
    assert rows == sorted(rows)
    assert "Each group was measured" not in page({"imports": {"seconds": {}, "machine": one}})
    assert len(groups(["32-true", "bf16-mixed"])) == 28


def test_unknown_group_prefix_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from experiments.benchmark import bench

    monkeypatch.setattr("sys.argv", ["bench.py", "--folder", str(tmp_path / "bench"), "pocket/ti"])
    with pytest.raises(
        SystemExit, match="groups: no group name starts with pocket/ti; available: imports, gate, pocket/lora/"
    ):
        bench.main()
    assert not (tmp_path / "bench").exists()


def test_failing_diffusers_script_is_reported_and_other_variants_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.benchmark import bench
    from experiments.benchmark.commands import Command, Shape

    def measured(watch: str, command: Command, steps: int, folder: Path) -> dict[str, Any]:
        if command.target.endswith(".py"):
            raise RuntimeError("python clock.py: no metrics\nRuntimeError: of two types\n\rSteps: 0%| | 0/1000")
        counted = {"operators": 1, "synchronisations": 0, "flop": 1, "most": {}} if watch == "count" else {}
        return {"ends": [float(i) for i in range(steps)], "peak_memory_bytes": 1, **counted}

    monkeypatch.setattr(bench, "measured", measured)
    shape = Shape("sd15", tmp_path / "weights", 256)
    results = bench.compared("dreambooth", shape, "32-true", bench.Peers(tmp_path / "examples"), tmp_path)
    assert results["does not run"] == dict.fromkeys(
        ("diffusers", "diffusers, best flags"), "RuntimeError: of two types"
    )
    assert results["sdtune"]["step_seconds"] == [1.0] * 3
    assert results["sdtune"]["operators"] == 1


def test_failing_sdtune_training_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.benchmark import bench
    from experiments.benchmark.commands import Shape

    def measured(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no metrics")

    monkeypatch.setattr(bench, "measured", measured)
    with pytest.raises(RuntimeError, match="no metrics"):
        bench.compared("lora", Shape("sd15", tmp_path, 256), "32-true", bench.Peers(), tmp_path)
