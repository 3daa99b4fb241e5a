"""Dependency graph of sdtune's packages, computed from its imports.

    python docs/package_graph.py             # writes it into ARCHITECTURE.md
    python docs/package_graph.py --count SRC # counts packages, edges, cycles and upward imports of a source tree

A package is a folder or a module directly in ``src/sdtune``; subfolders belong to their top-level folder. Imports
inside functions and under ``TYPE_CHECKING`` count like any other import.
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
    "configs, models, data, runs": (("config",), ("backbone",), ("captioning", "reporting"), ("runs", "data")),
    "foundations": (
        ("formats", "images", "hardware", "objective"),
        (
            "conditioning",
            "files",
            "lightning_compat",
            "log_filters",
            "loggers",
            "lr_schedule",
            "output_streams",
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
"""Layers from the top down, grouped into the boxes of the diagram."""

LAYERS = tuple(layer for layers in BANDS.values() for layer in layers)
"""Layers from the top down: a package may import only from layers below its own."""

Graph = Mapping[str, frozenset[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name relative to the package -> file; ``__init__`` has the folder's name, "" for the package itself."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        files[name.removesuffix("__init__").removesuffix(".")] = path
    return files


def imported(path: Path, name: str = "sdtune") -> Iterator[str]:
    """Dotted names, relative to the package ``name``, of everything that ``path`` imports from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{name}.")]
            yield from (dotted.removeprefix(f"{name}.") for dotted in names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == name:
            inside = node.module.removeprefix(name).removeprefix(".")
            yield from (f"{inside}.{alias.name}".removeprefix(".") for alias in node.names)


def module_graph(package: Path) -> Graph:
    """Module -> modules that it imports."""
    known = modules(package)

    def target(dotted: str) -> str:
        parts = dotted.split(".")
        return next(name for k in range(len(parts), -1, -1) if (name := ".".join(parts[:k])) in known)

    graph = {}
    for name, path in known.items():
        graph[name] = frozenset(target(dotted) for dotted in imported(path, package.name)) - {name}
    return graph


def package_graph(package: Path) -> Graph:
    """Package -> packages that it imports, without ``__init__`` and ``__main__`` of the root."""
    imports: dict[str, set[str]] = {}
    for name, targets in module_graph(package).items():
        package_name = name.split(".")[0]
        if package_name not in ("", "__main__"):
            imports.setdefault(package_name, set()).update(target.split(".")[0] for target in targets)
    return {name: frozenset(targets - {name, "", "__main__"}) for name, targets in imports.items()}


def cycles(graph: Graph) -> list[frozenset[str]]:
    """Strongly connected components with more than one node."""

    @cache
    def stoppable(start: str) -> frozenset[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for node in graph[pending.pop()] - seen:
                seen.add(node)
                pending.append(node)
        return frozenset(seen)

    components = {frozenset(b for b in stoppable(a) if a in stoppable(b)) for a in graph if a in stoppable(a)}
    return sorted(components, key=sorted)


def upward(graph: Graph) -> int:
    """Minimum number of upward imports over all orders of the packages; 0 if there is no cycle."""
    return sum(_fewest_upward(graph, tuple(sorted(component))) for component in cycles(graph))


def _fewest_upward(graph: Graph, nodes: tuple[str, ...]) -> int:
    """Minimum number of upward imports among ``nodes``, by dynamic programming over the sets of lower nodes."""
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
    """Transitive reduction: edges of an acyclic graph that no longer path implies.

    Edges to ``errors`` are omitted, since every package may import it.
    """
    edges = {node: targets - {"errors"} for node, targets in graph.items()}

    @cache
    def below(node: str) -> frozenset[str]:
        return edges[node].union(*map(below, edges[node]))

    return sorted(
        (node, target) for node in edges for target in edges[node] if not any(target in below(t) for t in edges[node])
    )


def sentence(package: str) -> str:
    """First line of the docstring of ``package``, in Markdown."""
    path = PACKAGE / package
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text, package
    return re.sub(r":\w+:`(\w+)`|``([^`]+)``", lambda match: f"`{match[1] or match[2]}`", text.splitlines()[0])


def drawn() -> list[str]:
    """Lines of the Mermaid diagram and of the table of packages."""
    graph = package_graph(PACKAGE)
    lines = ["```mermaid", "graph TD"]
    for number, (band, layers) in enumerate(BANDS.items()):
        members = [package for layer in layers for package in layer]
        lines += [f'  subgraph band{number}["{band}"]', *(f"    {package}" for package in members), "  end"]
    lines += [f"  {node} --> {target}" for node, target in reduced(graph)]
    lines += ["```", "", "| package, from the top layer down | |", "|---|---|"]
    for layer in LAYERS:
        for package in layer:
            suffix = "/" if (PACKAGE / package).is_dir() else ".py"
            lines.append(f"| `{package}{suffix}` | {sentence(package)} |")
    return lines


def page() -> str:
    """Content of ARCHITECTURE.md with the current graph between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE.name} lacks {BEGIN} and {END}"
    return "\n".join([before + BEGIN, *drawn(), END + after])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the graph of sdtune's packages into ARCHITECTURE.md.")
    parser.add_argument(
        "--count",
        type=Path,
        metavar="SRC",
        help="print the counts of a source folder such as src/sdtune; write nothing",
    )
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
