"""The wheel, installed in an empty environment outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RECIPE = """# @package _global_
# sdtune train -cd conf experiment=mine
defaults:
  - override /method: lora
method:
  rank: 2
trainer:
  max_steps: 3
evaluation: null
callbacks:
  samples: null
"""


def check_contents(names: list[str]) -> None:
    """The wheel has all configs and recipes and py.typed, but no tools, results and tests of the repository."""
    conf = {f"sdtune/conf/{file}" for file in configs(ROOT / "conf")}
    assert "sdtune/conf/experiment/lora_subject.yaml" in conf
    assert {name for name in names if name.startswith("sdtune/conf/")} == conf
    assert "sdtune/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"sdtune", "hydra_plugins", "sdtune-0.1.0.dist-info"}
    assert [n for n in names if n.endswith(".png") and not n.startswith("sdtune/pocket/art/")] == []


def configs(folder: Path) -> list[str]:
    """YAML files below ``folder``, including those behind its symlink to the recipes."""
    walked = os.walk(folder, followlinks=True)
    files = [Path(parent) / name for parent, _, names in walked for name in names if name.endswith(".yaml")]
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT))
    check_contents(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))
    binaries = tmp_path / "env" / "bin"
    wheel = next((tmp_path / "dist").glob("*.whl"))
    run(str(binaries / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel))
    sdtune = str(binaries / "sdtune")

    run(sdtune, "train", "debug=smoke", "hydra.run.dir=smoke")
    assert (tmp_path / "smoke" / "metrics.json").exists()

    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    run(sdtune, "train", "-cd", "conf", "experiment=mine", "hydra.run.dir=mine")
    rows = (tmp_path / "mine" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4
    assert "lora_subject" in run(sdtune, "train", "--help")
    assert "859,520,964" in run(sdtune, "plan", "method=full", "backbone=sd15", "callbacks.samples=null")
