"""Rules of ARCHITECTURE.md: layers, imports of libraries, sizes, names, and commands that do not import torch."""

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
    "hydra": {"cli", "commands.threads", "commands.train", "config", "runs", "sweeps"},
    "omegaconf": {"cli", "commands", "config", "files", "runs", "sweeps"},
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
        "training.collective",
    },
    "lightning_fabric": {"callbacks.checkpoints", "lightning_compat"},
    "diffusers": {
        "backbone",
        "pocket",
        "sampling",
    },
    "transformers": {
        "backbone",
        "captioning",
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
"""Library -> packages and modules that may import it, also inside functions."""

WITHOUT_TORCH = {"cli", "errors", "files", "paths", "progress", "reporting", "runs", "streams", "suggest"}
NEAR_LEAVES = {"objective": {"errors"}, "formats": {"errors", "files"}} | {name: {"errors"} for name in FLAT}
"""Package -> the only packages of sdtune that it may import."""

COMPAT = {
    "config.hydra_compat": ("hydra", "omegaconf"),
    "lightning_compat": ("pytorch_lightning", "lightning_fabric"),
    "peft_compat": ("peft",),
    "torch_compat": ("torch",),
}
"""Module -> libraries whose private names only this module may use."""

MAX_LINES, MAX_MEMBERS = 40, 20


def inside(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@cache
def libraries(module: str) -> frozenset[str]:
    """Dotted names that ``module`` imports, at any place in the module."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def uses(module: str, *names: str) -> set[str]:
    return {i for i in libraries(module) for name in names if i == name or i.startswith(f"{name}.")}


# --- layers


def test_every_package_has_a_layer() -> None:
    layered = [name for layer in graphs.LAYERS for name in layer]
    assert sorted(layered) == sorted(PACKAGES)


def test_imports_point_down_only() -> None:
    level = {name: i for i, layer in enumerate(graphs.LAYERS) for name in layer}
    upward = [f"{a} imports {b}" for a, targets in PACKAGES.items() for b in targets if level[b] <= level[a]]
    assert upward == []


def test_module_graph_has_no_cycles() -> None:
    assert [sorted(cycle) for cycle in graphs.cycles(GRAPH)] == []


def test_graph_in_architecture_md_is_up_to_date() -> None:
    assert graphs.PAGE.read_text(encoding="utf-8") == graphs.page()
    assert len(graphs.reduced(PACKAGES)) <= 49


@pytest.mark.parametrize("package", sorted(NEAR_LEAVES))
def test_near_leaf_packages_import_only_allowed_packages(package: str) -> None:
    assert PACKAGES[package] <= NEAR_LEAVES[package]


def test_errors_and_hardware_packages_import_nothing() -> None:
    assert libraries("errors") <= {"__future__.annotations"}
    assert libraries("hardware") <= {"__future__.annotations"}, "every module may import hardware.processes"


def test_pocket_world_imports_nothing_else_of_pocket() -> None:
    own_modules = {name for name in MODULES if inside(name, {"pocket.world"})}
    seen = {target for name in own_modules for target in GRAPH[name] if inside(target, {"pocket"})}
    assert seen <= own_modules | {"pocket"}


# --- libraries


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_is_imported_only_in_the_listed_modules(library: str) -> None:
    assert [name for name in MODULES if uses(name, library) and not inside(name, LIBRARIES[library])] == []
    unused_prefixes = {p for p in LIBRARIES[library] if not any(uses(m, library) for m in MODULES if inside(m, {p}))}
    assert unused_prefixes == set(), "LIBRARIES lists packages that no longer import it"


def test_data_imports_no_model_library() -> None:
    own_modules = [name for name in MODULES if inside(name, {"data"})]
    assert {name: used for name in own_modules if (used := uses(name, "diffusers", "peft", "sdtune.backbone"))} == {}
    for name in own_modules:
        import_time = {i for node in TREES[name].body for i in _import_time_imports(node)}
        assert not {i for i in import_time if i.split(".")[0] == "transformers"}, f"{name}: import it inside a function"


def _import_time_imports(node: ast.stmt) -> Iterator[str]:
    """Dotted names of the imports in ``node`` that run when the module is imported."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
    elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
        for child in node.body + node.orelse:
            yield from _import_time_imports(child)
    elif isinstance(node, ast.Try):
        for child in node.body + node.orelse + node.finalbody:
            yield from _import_time_imports(child)


@pytest.mark.parametrize("package", sorted(WITHOUT_TORCH))
def test_package_imports_no_torch(package: str) -> None:
    """Neither directly nor through the imports of its modules at import time."""
    pending = [name for name in MODULES if inside(name, {package})]
    seen = set(pending)
    while pending:
        name = pending.pop()
        import_time = {i for node in TREES[name].body for i in _import_time_imports(node)}
        assert not {i for i in import_time if i.split(".")[0] == "torch"}, name
        imported = {i.removeprefix("sdtune.") for i in import_time if i.startswith("sdtune.")} & set(MODULES)
        # Importing a module imports its parent packages first.
        imported |= {".".join(i.split(".")[:k]) for i in imported for k in range(1, i.count(".") + 1)}
        pending += imported - seen
        seen |= imported


def test_only_listed_modules_use_import_module() -> None:
    """The other rules do not see imports by a string."""
    importers = {
        name
        for name, tree in TREES.items()
        if "import_module" in _attributes(tree) | set(map(_last_part, libraries(name)))
    }
    assert importers == {"", "cli.launch", "config.targets"}


def _attributes(tree: ast.Module) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _last_part(dotted: str) -> str:
    return dotted.rpartition(".")[2]


@pytest.mark.parametrize("package", ["objective", "formats"])
def test_package_uses_tensors_only(package: str) -> None:
    no = ("transformers", "diffusers", "peft", "pytorch_lightning", "torch.nn.Module")
    assert {name: uses(name, *no) for name in MODULES if inside(name, {package}) and uses(name, *no)} == {}


CONFIG_AS_MAPPING = {"cli", "commands", "config", "shared_backbone.compatibility", "sweeps"}
RECORDS_OR_READS_SAVED = {"callbacks.config_agreement", "exporting.card", "loggers", "reporting", "runs"}
"""Modules that record or compare a resolved copy of the config, or read the saved config of another run."""


def test_only_listed_modules_use_a_composed_config_as_mapping() -> None:
    """Other modules do not index a config by the name of a group, as in ``config["optimizer"]``."""
    conf = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text(encoding="utf-8"))
    named = {str(name) for entry in conf["defaults"] if isinstance(entry, dict) for name in entry}
    groups = named & {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert groups >= {"backbone", "data", "method", "optimizer", "trainer"}
    subscripts = {
        f"{name}: {ast.unparse(node)}"
        for name in MODULES
        if not inside(name, CONFIG_AS_MAPPING | RECORDS_OR_READS_SAVED)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value in groups
        and ast.unparse(node.value) in ("config", "composed", "cfg")
    }
    assert subscripts == set()


# --- private names


def test_private_names_of_libraries_are_used_only_in_compat_modules() -> None:
    private_names = {name: sorted(set(_private(name))) for name in MODULES if name not in COMPAT}
    assert {name: names for name, names in private_names.items() if names} == {}


@pytest.mark.parametrize("module", COMPAT)
def test_compat_module_uses_private_names_of_its_libraries_only(module: str) -> None:
    others = {library for libraries_ in COMPAT.values() for library in libraries_} - set(COMPAT[module])
    private = {i for i in uses(module, *others) if any(part.startswith("_") for part in i.split("."))}
    assert private == set()


_CONFIG_KEYS = {"_target_", "_partial_"}
"""Documented keys of Hydra that look like private names."""


@cache
def _defined_names(module: str) -> frozenset[str]:
    """Names of all functions, classes, variables and attributes that ``module`` defines."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return frozenset(names)


def _known_names(module: str, include_bases: bool) -> frozenset[str]:
    """Names defined in ``module`` and, for attributes of ``self`` or ``cls``, in the modules of the base classes."""
    own_classes = [cls for cls in classes() if include_bases and cls.__module__ == f"sdtune.{module}"]
    bases = {base.__module__.removeprefix("sdtune.") for cls in own_classes for base in cls.__mro__} & set(MODULES)
    return frozenset.union(_defined_names(module), *map(_defined_names, bases), _CONFIG_KEYS)


def _private(module: str) -> Iterator[str]:
    """Private names that ``module`` uses but does not define: imports, and attributes."""
    for name in libraries(module):
        if any(part.startswith("_") and part != "__future__" for part in name.split(".")):
            yield name
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if node.attr not in _known_names(module, ast.unparse(node.value) in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_") and not name.value.endswith("__"):
                yield ast.unparse(node)


# --- sizes


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of lines of ``function`` without signature and docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions below ``node`` with their qualified names, including methods and nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{child.name}", child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{name}.{child.name}" if named else name)


def test_functions_are_short() -> None:
    too_long = {
        name: lines
        for module, tree in TREES.items()
        for name, function in functions(tree, module)
        if (lines := lines_of(function)) > MAX_LINES
    }
    assert too_long == {}


def test_classes_have_few_public_members() -> None:
    member_counts = {f"{cls.__module__.removeprefix('sdtune.')}.{cls.__name__}": len(members(cls)) for cls in classes()}
    assert {name: width for name, width in member_counts.items() if width > MAX_MEMBERS} == {}


@cache
def classes() -> tuple[type, ...]:
    own_classes: list[type] = []
    for name in MODULES:
        if name not in ("", "__main__"):
            module = importlib.import_module(f"sdtune.{name}")
            own_classes += [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]
    return tuple(own_classes)


def members(cls: type) -> set[str]:
    """Public methods and properties that ``cls`` adds, without overridden members of its bases."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    added = {n: v for n, v in vars(cls).items() if not n.startswith("_") and n not in inherited}
    return {n for n, v in added.items() if inspect.isroutine(v) or inspect.isdatadescriptor(v) or hasattr(v, "func")}


# --- names


def test_public_class_names_are_unique() -> None:
    assert _duplicates(ast.ClassDef, lambda module: module) == {}


def test_public_function_names_are_unique_across_packages() -> None:
    """Except ``main``, and ``read``, ``write`` and ``parse`` of formats, which are called with the module name."""
    assert _duplicates(ast.FunctionDef, lambda module: module if module in FLAT else module.rpartition(".")[0]) == {}


def _duplicates(kind: type[ast.ClassDef | ast.FunctionDef], namespace_of) -> dict[str, set[str]]:  # type: ignore[no-untyped-def]
    namespaces: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        shared = {"main"} | ({"read", "write", "parse"} if inside(module, {"formats"}) else set())
        for node in tree.body:
            if isinstance(node, kind) and not node.name.startswith("_") and node.name not in shared:
                namespaces.setdefault(node.name, set()).add(namespace_of(module))
    return {name: spaces for name, spaces in namespaces.items() if len(spaces) > 1}


def test_no_module_is_named_utils_or_helpers() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {part for name in MODULES for part in name.split(".")}


def test_every_module_has_a_docstring() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_test_folders_mirror_the_packages() -> None:
    folders = {p.parent.relative_to(ROOT / "tests").as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
    packages = {name.replace(".", "/") for name, path in MODULES.items() if path.name == "__init__.py"}
    assert folders - packages - {".", "docs", "experiments", "fuzz", "golden", "gpu_stub"} == set()
    flat = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    assert flat - FLAT - {"architecture", "compat", "configs", "docs", "messages", "public_api", "wheel"} == set()


# --- answers without torch

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
        (["train", "method.rnak=4"], 2, "did you mean method.rank?"),
        (["train", "method=lroa"], 2, "did you mean lora?"),
        (["trian"], 2, "unknown command"),
        (["report", "--help"], 0, "usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_answers_without_importing_torch(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        env={**os.environ, "COLUMNS": "200"},
    )
    *lines, heavy = done.stderr.splitlines()
    assert heavy == "HEAVY"
    assert done.returncode == code
    if code:
        assert len(lines) == 1
        assert lines[0].startswith("sdtune: ")
        assert words in lines[0]
    else:
        assert lines == []
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- families

_UNET_NAMES = {
    "backbone/locate.py": "folder names of pipelines",
    "backbone/loading.py": "the backbone class of the families with a UNet",
    "cli/import_kohya.py": "option names of kohya's scripts",
    "cli/kohya_options.py": "option names of kohya's scripts",
    "pocket/pretraining/assemble.py": "pocket has a UNet",
}
"""Files that may name the UNet, apart from comments, and the reasons."""


def test_unet_is_named_only_where_it_must_be() -> None:
    places = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith(("backbone/families", "formats", "shared_backbone")):
            places[name] = _names_unet(ast.parse(file.read_text(encoding="utf-8")))
    assert {name for name, names_it in places.items() if names_it} == set(_UNET_NAMES)


def _names_unet(tree: ast.Module) -> bool:
    """Whether a name or a string names the UNet; docstrings do not count."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = [
        node.value if isinstance(node, ast.Constant) else getattr(node, field, None)
        for node in ast.walk(tree)
        for field in ("id", "attr", "arg", "name", "module")
        if id(node) not in docstrings
    ]
    return any(isinstance(word, str) and "unet" in word.lower() for word in words)
