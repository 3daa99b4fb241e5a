"""The import arrows of ARCHITECTURE.md, the length of files, and what answers without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = SRC / "sdtune"

LAYERS = [
    {"__init__", "train", "run", "checks", "report_lines", "prepare", "prepare_run"}  # commands
    | {
        "export",
        "export_run",
        "sample",
        "sample_run",
        "evaluate",
        "evaluate_run",
        "plan",
        "plan_run",
        "report",
        "reporting",
        "comparison",
        "sharing",
        "shared_group",
        "shared_launcher",
    },
    {"callbacks", "evaluation", "exporting", "pocket", "planning"},
    {"methods"},
    {"sampling", "adapters", "controlnets"},
    {"backbone"},
    {"objective"},
]
"""Each may import from itself and from those below it; modules that stand in none are tools that import no layer."""

ANYWHERE = {"data", "formats"}
"""Beside the layers: they know no model, and any layer may use them."""

HYDRA = (
    {
        "launch",
        "sweeps",
        "jobs",
        "optuna_sweeper",
        "shared_group",
        "shared_launcher",
        "checks",
        "resume",
        "train",
        "sample",
        "evaluate",
    }
    | {f"{command}_run" for command in ("prepare", "sample", "evaluate", "export", "plan")}
    | {"run"}
)
COMPOSES = {"comparison.figures"}
"""A recipe that it does not run."""
OMEGACONF_FOR_TYPES = {"train", "sample", "evaluate"}
READS_CONFIGS = {"reporting.collect", "pocket.table"}
"""Those of runs that are over."""


def modules() -> dict[str, Path]:
    """Dotted name below sdtune -> file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(path: Path, module: str) -> set[str]:
    """Everything that ``path`` imports, at the top or inside a function, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module
            # "from sdtune import run" and "from sdtune.run import plain" alike.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()
IMPORTS = {name: imports(path, name) for name, path in MODULES.items()}


def unit(name: str) -> str:
    return name.split(".")[0]


def level(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if unit(name) in layer), None)


def own(name: str) -> set[str]:
    """The modules of sdtune that ``name`` imports, as units."""
    inside = {i.removeprefix("sdtune.") for i in IMPORTS[name] if i.startswith("sdtune.")}
    return {unit(i) for i in inside if i in MODULES or i.rpartition(".")[0] in MODULES} & {unit(m) for m in MODULES}


def uses(name: str, *packages: str) -> list[str]:
    return [p for p in packages if any(i == p or i.startswith(f"{p}.") for i in IMPORTS[name])]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name: str) -> None:
    mine = level(name)
    for other in own(name) - {unit(name)}:
        theirs = level(other)
        if theirs is None:
            continue
        # backbone.path=pocket means the folder that the package ships, and pocket's __init__ holds nothing but paths.
        if other == "pocket" and IMPORTS["pocket"] <= {
            "__future__",
            "__future__.annotations",
            "pathlib",
            "pathlib.Path",
        }:
            continue
        assert mine is not None, f"sdtune.{name} imports sdtune.{other}, which is a layer"
        assert theirs >= mine, f"sdtune.{name} imports sdtune.{other} from above it"
        assert theirs > mine or mine in (0, 1, 3), f"sdtune.{name} imports sdtune.{other} beside it"


@pytest.mark.parametrize("name", [m for m in MODULES if unit(m) == "data"])
def test_data_knows_no_model(name: str) -> None:
    assert not own(name) & {unit for layer in LAYERS for unit in layer}
    assert not uses(name, "transformers", "diffusers", "peft")


@pytest.mark.parametrize("name", [m for m in MODULES if unit(m) == "formats"])
def test_formats_see_tensors_and_not_modules(name: str) -> None:
    assert not own(name) - {"formats"}
    assert not uses(name, "transformers", "diffusers", "peft", "pytorch_lightning", "torch.nn")


@pytest.mark.parametrize("name", [m for m in MODULES if unit(m) == "objective"])
def test_the_objective_is_pure(name: str) -> None:
    assert not own(name) - {"objective"}
    assert not uses(name, "transformers", "diffusers", "peft", "pytorch_lightning", "pathlib", "os", "sdtune.paths")


@pytest.mark.parametrize("name", [m for m in MODULES if unit(m) in {"backbone", "sampling", "adapters", "controlnets"}])
def test_the_backbone_knows_no_trainer(name: str) -> None:
    assert not uses(name, "pytorch_lightning", "lightning_fabric", "peft")


@pytest.mark.parametrize("name", MODULES)
def test_only_commands_import_hydra(name: str) -> None:
    if name not in HYDRA | COMPOSES | READS_CONFIGS:
        assert not uses(name, "hydra", "omegaconf")
    if name in OMEGACONF_FOR_TYPES | READS_CONFIGS:
        assert uses(name, "hydra") == []


def test_the_test_knows_every_module_it_speaks_of() -> None:
    units = {unit(name) for name in MODULES}
    assert {u for layer in LAYERS for u in layer} | ANYWHERE | HYDRA <= units


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {part for name in MODULES for part in name.split(".")}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


# --- at once

_PROBE = """
import sys
sys.argv = ["sdtune", *sys.argv[1:]]
from sdtune.cli.main import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
heavy = [m for m in ("torch", "pytorch_lightning", "diffusers", "transformers", "numpy", "PIL") if m in sys.modules]
print("HEAVY", *heavy, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "sample"),
        (["--version"], 0, "."),
        (["train", "--cfg", "job"], 0, "_target_: sdtune.methods.LoRA"),
        (["train", "--help"], 0, "method"),
        (["sample", "--cfg", "job"], 0, "guidance"),
        (["plan", "--cfg", "job"], 0, "fits: null"),
        (["plan", "--help"], 0, "method"),
        (["train", "method.rnak=4"], 2, "did you mean rank?"),
        (["train", "method=lroa"], 2, "did you mean lora?"),
        (["trian"], 2, "no such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_answers_without_torch(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        env={**os.environ, "COLUMNS": "200"},
    )
    *said, heavy = done.stderr.splitlines()
    assert heavy == "HEAVY"
    assert done.returncode == code
    if code:
        assert len(said) == 1
        assert said[0].startswith("sdtune: ")
        assert words in said[0]
    else:
        assert said == []
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
