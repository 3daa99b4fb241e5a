"""The graph of sdtune's packages, from its real imports.

    python docs/package_graph.py             # writes it into ARCHITECTURE.md
    python docs/package_graph.py --count SRC # counts packages, edges, cycles and upward imports of a source tree

A package is a folder or a module that lies flat in ``src/sdtune``; what lies in a folder's folders counts as its own.
Imports inside functions and under ``TYPE_CHECKING`` count like any other.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sdtune"
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- packages -->", "<!-- /packages -->"

BANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "command line": (("cli",), ("sweeps",), ("commands",)),
    "around a training": (("shared_backbone",), ("planning",), ("callbacks",)),
    "methods": (("pocket",), ("methods",), ("training",)),
    "artifacts": (("evaluation", "exporting"), ("sampling",), ("loaders",)),
    "configs, models, data, runs": (("config",), ("backbone",), ("reporting",), ("runs", "data")),
    "foundations": (
        ("formats", "images", "hardware", "objective"),
        (
            "files",
            "lightning_compat",
            "log_filters",
            "loggers",
            "lr_schedule",
            "paths",
            "peft_compat",
            "progress",
            "quoting",
            "randomness",
            "streams",
            "suggest",
            "torch_compat",
        ),
        ("errors",),
    ),
}
"""Layers from the top down, in bands that the picture frames."""

LAYERS = tuple(layer for layers in BANDS.values() for layer in layers)
"""From the top down: a package imports from the layers below its own alone."""

Graph = Mapping[str, frozenset[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a folder's ``__init__`` has the folder's name, the package's own is ""."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


def imported(path: Path, name: str = "sdtune") -> Iterator[str]:
    """Dotted names, below the package, of everything that ``path`` may import of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{name}.")]
            yield from (dotted.removeprefix(f"{name}.") for dotted in names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == name:
            inside = node.module.removeprefix(name).removeprefix(".")
            yield from (f"{inside}.{alias.name}".removeprefix(".") for alias in node.names)


def module_graph(package: Path) -> Graph:
    """Module -> the modules that it imports."""
    known = modules(package)

    def target(dotted: str) -> str:
        parts = dotted.split(".")
        return next(name for k in range(len(parts), -1, -1) if (name := ".".join(parts[:k])) in known)

    graph = {}
    for name, path in known.items():
        graph[name] = frozenset(target(dotted) for dotted in imported(path, package.name)) - {name}
    return graph


def package_graph(package: Path) -> Graph:
    """Package -> the packages that it imports; the root's own modules are left out."""
    found: dict[str, set[str]] = {}
    for name, targets in module_graph(package).items():
        own = name.split(".")[0]
        if own not in ("", "__main__"):
            found.setdefault(own, set()).update(target.split(".")[0] for target in targets)
    return {name: frozenset(targets - {name, "", "__main__"}) for name, targets in found.items()}


def cycles(graph: Graph) -> list[frozenset[str]]:
    """The strongly connected components of more than one node."""

    @cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for node in graph[left.pop()] - seen:
                seen.add(node)
                left.append(node)
        return frozenset(seen)

    components = {frozenset(b for b in reached(a) if a in reached(b)) for a in graph if a in reached(a)}
    return sorted(components, key=sorted)


def upward(graph: Graph) -> int:
    """How many imports point up in the order of packages in which the fewest do: none where there is no cycle."""
    return sum(_fewest(graph, tuple(sorted(component))) for component in cycles(graph))


def _fewest(graph: Graph, nodes: tuple[str, ...]) -> int:
    """By dynamic programming over the sets that may stand below."""
    masks = [sum(1 << i for i, other in enumerate(nodes) if other in graph[node]) for node in nodes]
    fewest = {0: 0}
    for below in range(1 << len(nodes)):
        if below in fewest:
            for i, mask in enumerate(masks):
                if not below >> i & 1:
                    above = (mask & ~below & ~(1 << i)).bit_count()
                    fewest[below | 1 << i] = min(fewest.get(below | 1 << i, 1 << 30), fewest[below] + above)
    return fewest[(1 << len(nodes)) - 1]


def reduced(graph: Graph) -> list[tuple[str, str]]:
    """The edges that no longer path stands for, of a graph without cycles.

    Those to ``errors`` are left out: every package may import it, and a picture of that says nothing.
    """
    own = {node: targets - {"errors"} for node, targets in graph.items()}

    @cache
    def below(node: str) -> frozenset[str]:
        return own[node].union(*map(below, own[node]))

    return sorted(
        (node, target) for node in own for target in own[node] if not any(target in below(t) for t in own[node])
    )


def sentence(package: str) -> str:
    """The first line of a package's docstring."""
    path = PACKAGE / package
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text, package
    return re.sub(r":\w+:`(\w+)`|``([^`]+)``", lambda match: f"`{match[1] or match[2]}`", text.splitlines()[0])


def drawn() -> list[str]:
    """The graph in Mermaid, and a line for each package."""
    graph = package_graph(PACKAGE)
    lines = ["```mermaid", "graph TD"]
    for number, (band, layers) in enumerate(BANDS.items()):
        members = [package for layer in layers for package in layer]
        lines += [f'  subgraph band{number}["{band}"]', *(f"    {package}" for package in members), "  end"]
    lines += [f"  {node} --> {target}" for node, target in reduced(graph)]
    lines += ["```", "", "| package, from the top layer down | |", "|---|---|"]
    for layer in LAYERS:
        for package in layer:
            mark = "/" if (PACKAGE / package).is_dir() else ".py"
            lines.append(f"| `{package}{mark}` | {sentence(package)} |")
    return lines


def page() -> str:
    """ARCHITECTURE.md with the graph of today between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE.name} lacks {BEGIN} and {END}"
    return "\n".join([before + BEGIN, *drawn(), END + after])


def main() -> None:
    parser = argparse.ArgumentParser(description="The graph of sdtune's packages.")
    parser.add_argument("--count", type=Path, metavar="SRC", help="a folder such as src/sdtune; writes nothing")
    source = parser.parse_args().count
    if source is None:
        PAGE.write_text(page(), encoding="utf-8")
        return
    graph = package_graph(source.resolve())
    edges = sum(map(len, graph.values()))
    print(f"{len(graph)} packages, {edges} edges, {len(cycles(graph))} cycles, {upward(graph)} upward imports")
    for component in cycles(graph):
        print("cycle:", ", ".join(sorted(component)))


if __name__ == "__main__":
    main()
