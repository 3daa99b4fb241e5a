"""The rules of ARCHITECTURE.md: layers, imports of libraries, sizes, names, and what answers without torch."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from docs import package_graph as graphs

PACKAGE, ROOT = graphs.PACKAGE, graphs.ROOT
MODULES = graphs.modules(PACKAGE)
GRAPH = graphs.module_graph(PACKAGE)
PACKAGES = graphs.package_graph(PACKAGE)
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
FLAT = {name for name in PACKAGES if not (PACKAGE / name).is_dir()}

LIBRARIES = {
    "hydra": {"cli", "commands.threads", "commands.train", "config", "runs.names", "sweeps"},
    "omegaconf": {"cli", "commands", "config", "reporting.collect", "runs.compare", "runs.names", "sweeps"},
    "pytorch_lightning": {
        "callbacks",
        "commands",
        "data.datamodule",
        "hardware.child_processes",
        "lightning_compat",
        "loggers",
        "methods",
        "planning",
        "pocket.pretraining",
        "shared_backbone",
        "training.caching",
    },
    "lightning_fabric": {"callbacks.checkpoints", "lightning_compat"},
    "diffusers": {
        "backbone",
        "loaders",
        "methods.controlnet",
        "pocket",
        "sampling",
        "shared_backbone",
        "training.executor",
    },
    "transformers": {
        "backbone",
        "data.control.estimators",
        "data.control.poses",
        "evaluation",
        "log_filters",
        "pocket.pretraining",
        "training.perceptual_loss",
    },
    "peft": {"methods.lora", "peft_compat", "shared_backbone.pool", "training.lora_layer"},
    "wandb": {"callbacks.samples", "loggers"},
}
"""Library -> the packages and modules that may import it, inside functions too."""

WITHOUT_TORCH = {"cli", "errors", "files", "paths", "progress", "reporting", "runs", "streams", "suggest"}
NEAR_LEAVES = {"objective": {"errors"}, "formats": {"errors", "files"}} | {name: {"errors"} for name in FLAT}
"""Package -> all that it may import of sdtune."""

COMPAT = {
    "config.hydra_compat": ("hydra", "omegaconf"),
    "lightning_compat": ("pytorch_lightning", "lightning_fabric"),
    "peft_compat": ("peft",),
    "torch_compat": ("torch",),
}
"""Module -> the libraries of which it alone uses private names."""

MOST_LINES, MOST_MEMBERS = 40, 20


def inside(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@cache
def libraries(module: str) -> frozenset[str]:
    """The dotted names that ``module`` imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def uses(module: str, *names: str) -> set[str]:
    return {i for i in libraries(module) for name in names if i == name or i.startswith(f"{name}.")}


# --- layers


def test_every_package_has_its_layer() -> None:
    layered = [name for layer in graphs.LAYERS for name in layer]
    assert sorted(layered) == sorted(PACKAGES)


def test_imports_point_down_only() -> None:
    level = {name: i for i, layer in enumerate(graphs.LAYERS) for name in layer}
    upward = [f"{a} imports {b}" for a, targets in PACKAGES.items() for b in targets if level[b] <= level[a]]
    assert upward == []


def test_no_module_imports_itself_through_others() -> None:
    assert [sorted(cycle) for cycle in graphs.cycles(GRAPH)] == []


def test_the_graph_in_the_architecture_is_todays() -> None:
    assert graphs.PAGE.read_text(encoding="utf-8") == graphs.page()
    assert len(graphs.reduced(PACKAGES)) <= 45


@pytest.mark.parametrize("package", sorted(NEAR_LEAVES))
def test_near_leaves_import_next_to_nothing(package: str) -> None:
    assert PACKAGES[package] <= NEAR_LEAVES[package]


def test_errors_import_nothing() -> None:
    assert libraries("errors") <= {"__future__.annotations"}
    assert libraries("hardware") <= {"__future__.annotations"}, "every module may import hardware.processes"


def test_pockets_world_knows_nothing_of_its_training() -> None:
    own = {name for name in MODULES if inside(name, {"pocket.world"})}
    seen = {target for name in own for target in GRAPH[name] if inside(target, {"pocket"})}
    assert seen <= own | {"pocket"}


# --- libraries


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_where_it_belongs(library: str) -> None:
    assert [name for name in MODULES if uses(name, library) and not inside(name, LIBRARIES[library])] == []
    unused = {p for p in LIBRARIES[library] if not any(uses(m, library) for m in MODULES if inside(m, {p}))}
    assert unused == set(), "the list names what imports it no more"


def test_data_knows_no_model() -> None:
    own = [name for name in MODULES if inside(name, {"data"})]
    assert {name: found for name in own if (found := uses(name, "diffusers", "peft", "sdtune.backbone"))} == {}
    for name in own:
        atop = {i for node in TREES[name].body for i in _imports_atop(node)}
        assert not {i for i in atop if i.split(".")[0] == "transformers"}, f"{name}: import it inside a function"


def _imports_atop(node: ast.stmt) -> Iterator[str]:
    """Dotted names of an import that runs when its module is read."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
    elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
        for child in node.body + node.orelse:
            yield from _imports_atop(child)
    elif isinstance(node, ast.Try):
        for child in node.body + node.orelse + node.finalbody:
            yield from _imports_atop(child)


@pytest.mark.parametrize("package", sorted(WITHOUT_TORCH))
def test_it_needs_no_torch(package: str) -> None:
    """Neither itself nor through what its modules import when they are read."""
    left = [name for name in MODULES if inside(name, {package})]
    seen = set(left)
    while left:
        name = left.pop()
        atop = {i for node in TREES[name].body for i in _imports_atop(node)}
        assert not {i for i in atop if i.split(".")[0] == "torch"}, name
        read = {i.removeprefix("sdtune.") for i in atop if i.startswith("sdtune.")} & set(MODULES)
        # A module's packages are read before it.
        read |= {".".join(i.split(".")[:k]) for i in read for k in range(1, i.count(".") + 1)}
        left += read - seen
        seen |= read


def test_modules_are_imported_by_name_in_few_places() -> None:
    """What is imported by a string escapes the other rules."""
    found = {
        name for name, tree in TREES.items() if "import_module" in _attributes(tree) | set(map(_last, libraries(name)))
    }
    assert found == {"", "cli.launch", "config.targets"}


def _attributes(tree: ast.Module) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


@pytest.mark.parametrize("package", ["objective", "formats"])
def test_tensors_alone(package: str) -> None:
    no = ("transformers", "diffusers", "peft", "pytorch_lightning", "torch.nn.Module")
    assert {name: uses(name, *no) for name in MODULES if inside(name, {package}) and uses(name, *no)} == {}


CONFIG_AS_MAPPING = {"cli", "commands", "config", "shared_backbone.compatibility", "sweeps"}
RECORDS_OR_READS_SAVED = {"callbacks.config_agreement", "exporting.card", "loggers", "reporting", "runs"}
"""These get a resolved copy to record or to compare, or read the saved config of another run."""


def test_a_composed_config_is_a_mapping_in_few_places() -> None:
    """Elsewhere nothing looks into one by a group's name, such as ``config["optimizer"]``."""
    conf = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text(encoding="utf-8"))
    named = {str(name) for entry in conf["defaults"] if isinstance(entry, dict) for name in entry}
    groups = named & {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert groups >= {"backbone", "data", "method", "optimizer", "trainer"}
    found = {
        f"{name}: {ast.unparse(node)}"
        for name in MODULES
        if not inside(name, CONFIG_AS_MAPPING | RECORDS_OR_READS_SAVED)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value in groups
        and ast.unparse(node.value) in ("config", "composed", "cfg")
    }
    assert found == set()


# --- private names


def test_private_names_of_libraries_stand_in_their_compat_modules() -> None:
    found = {name: sorted(set(_private(name))) for name in MODULES if name not in COMPAT}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("module", COMPAT)
def test_a_compat_module_is_of_its_library_alone(module: str) -> None:
    others = {library for libraries_ in COMPAT.values() for library in libraries_} - set(COMPAT[module])
    private = {i for i in uses(module, *others) if any(part.startswith("_") for part in i.split("."))}
    assert private == set()


_CONFIG_KEYS = {"_target_", "_partial_"}
"""Hydra's documented keys, which look private."""


@cache
def _named_in(module: str) -> frozenset[str]:
    """Every name that ``module`` itself gives to a function, a class, a variable or an attribute of its own."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return frozenset(names)


def _known_in(module: str, of_itself: bool) -> frozenset[str]:
    """Names of ``module``, and, where an object asks for its own, of the modules that its classes derive from."""
    own = [cls for cls in classes() if of_itself and cls.__module__ == f"sdtune.{module}"]
    bases = {base.__module__.removeprefix("sdtune.") for cls in own for base in cls.__mro__} & set(MODULES)
    return frozenset.union(_named_in(module), *map(_named_in, bases), _CONFIG_KEYS)


def _private(module: str) -> Iterator[str]:
    """The private names of others that ``module`` uses: what it imports, and attributes that sdtune gave to nothing."""
    for name in libraries(module):
        if any(part.startswith("_") and part != "__future__" for part in name.split(".")):
            yield name
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr not in _known_in(module, ast.unparse(node.value) in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_") and not name.value.endswith("__"):
                yield ast.unparse(node)


# --- sizes


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without signature and docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name, those in classes and in functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{child.name}", child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{name}.{child.name}" if named else name)


def test_functions_are_short() -> None:
    long = {
        name: lines
        for module, tree in TREES.items()
        for name, function in functions(tree, module)
        if (lines := lines_of(function)) > MOST_LINES
    }
    assert long == {}


def test_classes_are_narrow() -> None:
    wide = {f"{cls.__module__.removeprefix('sdtune.')}.{cls.__name__}": len(members(cls)) for cls in classes()}
    assert {name: width for name, width in wide.items() if width > MOST_MEMBERS} == {}


@cache
def classes() -> tuple[type, ...]:
    found: list[type] = []
    for name in MODULES:
        if name not in ("", "__main__"):
            module = importlib.import_module(f"sdtune.{name}")
            found += [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]
    return tuple(found)


def members(cls: type) -> set[str]:
    """Public methods and properties that ``cls`` adds; hooks of a base that it overrides are not its own."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    own = {n: v for n, v in vars(cls).items() if not n.startswith("_") and n not in inherited}
    return {n for n, v in own.items() if inspect.isroutine(v) or inspect.isdatadescriptor(v) or hasattr(v, "func")}


# --- names


def test_no_public_class_has_two_homes() -> None:
    assert _twice(ast.ClassDef, lambda module: module) == {}


def test_no_public_function_has_two_homes() -> None:
    """But ``main``, and a format's ``read``, ``write`` and ``parse``, which are called with their module's name."""
    assert _twice(ast.FunctionDef, lambda module: module if module in FLAT else module.rpartition(".")[0]) == {}


def _twice(kind: type[ast.ClassDef | ast.FunctionDef], home) -> dict[str, set[str]]:  # type: ignore[no-untyped-def]
    homes: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        shared = {"main"} | ({"read", "write", "parse"} if inside(module, {"formats"}) else set())
        for node in tree.body:
            if isinstance(node, kind) and not node.name.startswith("_") and node.name not in shared:
                homes.setdefault(node.name, set()).add(home(module))
    return {name: found for name, found in homes.items() if len(found) > 1}


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {part for name in MODULES for part in name.split(".")}


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_tests_stand_where_what_they_test_does() -> None:
    folders = {p.parent.relative_to(ROOT / "tests").as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
    packages = {name.replace(".", "/") for name, path in MODULES.items() if path.name == "__init__.py"}
    assert folders - packages - {".", "docs", "experiments", "golden"} == set()
    flat = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    assert flat - FLAT - {"architecture", "compat", "configs", "public_api", "wheel"} == set()


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
        (["report", "--help"], 0, "usage"),
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
