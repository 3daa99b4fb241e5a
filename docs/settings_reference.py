"""Write docs/settings.md, the reference of all settings, and the texts of ``--help``.

    python docs/settings_reference.py

Both are made from the YAML files and the docstrings. The texts of ``--help`` are a file, because reading docstrings
means importing torch, which takes seconds.

A setting's description is the ``Args`` entry of the class that its group configures; if there is none, the comment
next to it in the YAML file.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from sdtune.config.targets import resolve
from sdtune.config.types import type_text

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "settings.md"
HELP = ROOT / "src" / "sdtune" / "cli" / "setting_texts.json"
TRUST = ("sdtune", "torch", "pytorch_lightning")

GROUPS = {
    "method": "Method",
    "backbone": "Backbone",
    "data": "Data",
    "data/control": "Control maps",
    "objective": "Objective",
    "optimizer": "Optimizer",
    "lr_schedule": "Learning-rate schedule",
    "trainer": "Trainer",
    "hardware": "Hardware",
    "checkpoint": "Checkpoints",
    "callbacks": "Callbacks",
    "evaluation": "Evaluation",
    "logger": "Logger",
    "hydra/launcher": "Launcher of a sweep",
    "hydra/sweeper": "Sweeper",
    "sweep": "Sweep files",
    "debug": "Debugging",
}
FIRST = ("auto", "base", "default", "simple", "adamw", "constant", "pocket", "sd15")
"""Options that are shown first; the tables of the others leave out what is the same."""

COMMANDS = {
    "train": "every run",
    "sample": "`sdtune sample`",
    "plan": "`sdtune plan`",
    "export": "`sdtune export`",
    "evaluate": "`sdtune evaluate`",
    "caption": "`sdtune caption`",
    "mask": "`sdtune mask`",
}
HELPED = (*COMMANDS, "prepare")


@dataclass(frozen=True)
class Row:
    """One setting: dotted key, default as written in YAML, type, description."""

    key: str
    default: str
    kind: str
    text: str


def page() -> str:
    """The page as Markdown."""
    parts = [
        "# All settings",
        "```bash\nsdtune train method.rank=16 optimizer.lr=1e-4 trainer.max_steps=400\n```",
        "Every setting is a Hydra override `key=value`; a group is chosen by `group=option`. `sdtune train --cfg job` "
        "prints the composed settings, `sdtune train --cfg job -p GROUP` those of a group. `make settings` generates "
        "this page from the YAML files in `conf/` and from the docstrings.",
        "The output folders are `paths.outputs`, `hydra.run.dir` and, for sweeps, `hydra.sweep.dir`.",
    ]
    for command, name in COMMANDS.items():
        parts += [f"## Settings of {name}", _head(CONF / f"{command}.yaml"), _table(list(_rows(f"{command}.yaml", "")))]
    known = {row.key: row for row in _rows("train.yaml", "")}
    for group, title in GROUPS.items():
        parts += [f"## {title}: `{group}=`", *_group(group, known)]
    return "\n\n".join(part for part in parts if part) + "\n"


def help_texts() -> dict[str, dict[str, str]]:
    """Texts of ``--help``: command or ``GROUP=OPTION`` -> dotted key -> description; the key "" is its own."""
    texts = {command: _texts(CONF / f"{command}.yaml", list(_rows(f"{command}.yaml", ""))) for command in HELPED}
    known = {row.key: row for row in _rows("train.yaml", "")}
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            rows = list(_rows(f"{group}/{path.name}", _prefix(group, path.stem)))
            known |= {row.key: row for row in rows if row.key not in known}
            texts[f"{group}={path.stem}"] = _texts(path, [_completed(row, known) for row in rows])
    return texts


def _texts(path: Path, rows: list[Row]) -> dict[str, str]:
    return {"": _words(_head(path)), **{row.key: _described(row) for row in rows}}


def _described(row: Row) -> str:
    kind = row.kind.replace("`", "")
    return " ".join(part for part in (_words(row.text), f"({kind})" if kind else "") if part)


def _words(text: str) -> str:
    """``text`` without the markup of docstrings."""
    plain = re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("`", "")
    return re.sub(r"\bNone\b", "null", plain.removesuffix("."))


def _group(group: str, known: dict[str, Row]) -> Iterator[str]:
    """The section of a group; ``known`` has the rows of earlier groups, and gets those of this one."""
    options = sorted((path.stem for path in (CONF / group).glob("*.yaml")), key=lambda o: (o not in FIRST, o))
    yield "\n".join(
        ["| option | |", "|---|---|", *(f"| `{o}` | {_cell(_head(CONF / group / f'{o}.yaml'))} |" for o in options)]
    )
    shown: dict[str, Row] = {}
    for option in options:
        rows = [_completed(row, known) for row in _rows(f"{group}/{option}.yaml", _prefix(group, option))]
        different = [row for row in rows if shown.get(row.key) != row]
        shown |= {row.key: row for row in rows if row.key not in shown}
        known |= {row.key: row for row in rows if row.key not in known}
        if different and len(options) > 1:
            yield f"**`{group}={option}`**" + (
                " (only the differences from the options above)" if different != rows else ""
            )
        yield _table(different)


def _completed(row: Row, known: dict[str, Row]) -> Row:
    """``row`` with the type and description of an earlier row of the same key, if it has none."""
    earlier = known.get(row.key, row)
    return Row(row.key, row.default, row.kind or earlier.kind, row.text or earlier.text)


def _prefix(group: str, option: str) -> str:
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    name = package[1] if package else group.replace("/", ".")
    return "" if name == "_global_" else f"{name}."


def _head(path: Path) -> str:
    """The comment at the top of a YAML file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _rows(name: str, prefix: str) -> Iterator[Row]:
    text = (CONF / name).read_text(encoding="utf-8")
    node = yaml.compose(text)
    if not isinstance(node, yaml.MappingNode):
        return
    target = next((v.value for k, v in node.value if k.value == "_target_"), None) or _sibling_target(name)
    if name == "train.yaml":
        target = "sdtune.config.settings.Settings"
    yield from _walk(node, prefix, target, text.splitlines())


def _sibling_target(name: str) -> str | None:
    """The class of the first option that builds on ``name``, for a file of shared settings such as data/base."""
    own = Path(name)
    for path in sorted((CONF / own.parent).glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if own.parent.name and own.stem in config.get("defaults", []) and "_target_" in config:
            return str(config["_target_"])
    return None


def _walk(node: yaml.MappingNode, prefix: str, target: str | None, lines: list[str]) -> Iterator[Row]:
    texts, hints = _documented(target)
    for key_node, value in node.value:
        key = str(key_node.value)
        if key in ("_target_", "_partial_", "defaults") or (prefix == "" and key == "hydra"):
            continue
        inner = isinstance(value, yaml.MappingNode) and not value.flow_style and value.value
        if inner:
            nested = next((v.value for k, v in value.value if k.value == "_target_"), None)
            yield from _walk(value, f"{prefix}{key}.", nested, lines)
            continue
        line = lines[value.end_mark.line]
        default = line[value.start_mark.column : value.end_mark.column]
        text = texts.get(key) or line[value.end_mark.column :].strip().lstrip("# ") or _above(lines, key_node)
        kind = type_text(hints[key], "`") if key in hints else ""
        yield Row(f"{prefix}{key}", default, kind, text)


def _above(lines: list[str], node: yaml.Node) -> str:
    """The comment in the lines directly above a key, unless it is the comment at the top of the file."""
    first = node.start_mark.line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(line.strip().lstrip("# ") for line in lines[first : node.start_mark.line]) if first > 0 else ""


def _documented(target: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """The ``Args`` entries and the type hints of a class of sdtune and of its bases."""
    if target is None or not target.startswith("sdtune."):
        return {}, {}
    cls = resolve(target, "_target_", TRUST)
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("sdtune"):
            texts |= _arguments(inspect.cleandoc(base.__doc__ or ""))
    return texts, get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__, include_extras=True)


def _arguments(doc: str) -> dict[str, str]:
    match = re.search(r"^Args:\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    entries = re.findall(r"^    (\w+(?:, \w+)*): ((?:.*)(?:\n        .*)*)", match[1], re.MULTILINE) if match else []
    return {name: re.sub(r"\s+", " ", text).replace("``", "`") for names, text in entries for name in names.split(", ")}


def _table(rows: list[Row]) -> str:
    if not rows:
        return ""
    typed = any(row.kind for row in rows)
    lines = ["| key | default | type | |", "|---|---|---|---|"] if typed else ["| key | default | |", "|---|---|---|"]
    for row in rows:
        kind = [_cell(row.kind)] if typed else []
        lines.append("| " + " | ".join([f"`{row.key}`", _code(row.default), *kind, _cell(row.text)]) + " |")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _cell(text: str) -> str:
    plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("|", "\\|")
    plain = re.sub(r"\bNone\b", "null", plain.removesuffix("."))
    # Outside of code, an underscore or an asterisk would be Markdown.
    plain = "`".join(part if i % 2 else re.sub(r"([_*])", r"\\\1", part) for i, part in enumerate(plain.split("`")))
    return re.sub(r"<(?=[\w-])", "&lt;", plain)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    HELP.write_text(json.dumps(help_texts(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
