"""``sdtune COMMAND --help``: options, config groups, and each setting of the composed config with a description."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtune.config.compose import WITHOUT_SWEEPS, compose, without_hydra
from sdtune.config.hydra_compat import initialized
from sdtune.runs.hydra_values import as_current

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.config_search_path import ConfigSearchPath

TEXTS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("setting_texts.json").read_text("utf-8"))
"""Command or ``GROUP=OPTION`` -> dotted key -> description, from the docstrings and the comments in ``conf/``."""

_USAGE = {
    "train": "[GROUP=OPTION ...] [KEY=VALUE ...]",
    "prepare": "[GROUP=OPTION ...] [KEY=VALUE ...]",
    "plan": "[GROUP=OPTION ...] [KEY=VALUE ...]",
    "sample": '"PROMPT" [run=RUN] [KEY=VALUE ...]',
    "export": "RUN [format=FORMAT] [KEY=VALUE ...]",
    "evaluate": "RUN [KEY=VALUE ...]",
    "caption": "DIR model=MODEL [KEY=VALUE ...]",
    "mask": "DIR model=MODEL words=WORDS [KEY=VALUE ...]",
}

_SWEEP = "-m, --multirun"
_OPTIONS = {
    _SWEEP: "sweep: a value with commas, such as seed=0,1, starts one job for each of its parts",
    "-cd, --config-dir DIR": "folder with config groups of your own",
    "--cfg job": "print the composed settings as YAML; with -p GROUP those of one group",
    "--info": "print how Hydra composes the settings",
    "--version": "print the version",
}
_INTERNAL = ("default_lr", "on_data", "paths")
"""Config groups that are not chosen on the command line."""
_SHARED = "base"
"""Option with the common settings of the other options of a group."""
_RECIPES = "experiment"
_LEFT = 36
"""Width of the column with keys and values."""


def print_help(command: str, search: ConfigSearchPath, overrides: Sequence[str]) -> None:
    """Print the help of ``command``, with the settings of the config options that ``overrides`` select."""
    config = compose(command, search, list(overrides))
    with initialized(command, search) as hydra, as_current(config):
        groups = option_groups(command, hydra.config_loader, config)
        lines = [*_head(command), "", *_group_lines(groups, config), *_setting_lines(command, config)]
    print("\n".join(lines))


def _head(command: str) -> list[str]:
    options = {name: text for name, text in _OPTIONS.items() if command not in WITHOUT_SWEEPS or name != _SWEEP}
    summary = TEXTS[command][""].partition(": ")[2]
    return [
        f"usage: sdtune {command} {_USAGE[command]} [OPTION ...]",
        "",
        *textwrap.wrap(summary[0].upper() + summary[1:] + ".", _width()),
        "",
        "options:",
        *(line for name, text in options.items() for line in _columns(name, text)),
    ]


def option_groups(command: str, loader: ConfigLoader, config: DictConfig) -> dict[str, list[str]]:
    """Config groups of ``command`` with their options, including those of the ``--config-dir``."""
    chosen = [str(name) for name in config.hydra.runtime.choices]
    known = [_RECIPES, *dict.fromkeys(source.partition("=")[0] for source in TEXTS if "=" in source)]
    names = [name for name in known if name in chosen and (not name.startswith("hydra") or command == "train")]
    names += [name for name in chosen if name not in (*known, *_INTERNAL) and not name.startswith("hydra")]
    return {name: _recipes(command, loader) if name == _RECIPES else _options(loader, name) for name in names}


def _options(loader: ConfigLoader, group: str) -> list[str]:
    return [name for name in loader.get_group_options(group, ObjectType.CONFIG) if name != _SHARED]


def _recipes(command: str, loader: ConfigLoader) -> list[str]:
    """Recipes for ``command``: those of ``sdtune sample`` are in a folder of their own."""
    if command == "sample":
        return [f"sample/{name}" for name in _options(loader, f"{_RECIPES}/sample")]
    folders = [name for name in loader.get_group_options(_RECIPES, ObjectType.GROUP) if name != "sample"]
    nested = [f"{folder}/{name}" for folder in folders for name in _options(loader, f"{_RECIPES}/{folder}")]
    return [*_options(loader, _RECIPES), *nested]


def _group_lines(groups: Mapping[str, Sequence[str]], config: DictConfig) -> Iterator[str]:
    if not groups:
        return
    yield "groups, GROUP=OPTION (* is chosen):"
    for group, options in groups.items():
        choice = config.hydra.runtime.choices.get(group)
        yield from _columns(group, "  ".join(f"*{name}" if name == choice else name for name in options), left_width=18)
    yield ""


def _setting_lines(command: str, config: DictConfig) -> Iterator[str]:
    """Lines about the settings of the composed config: first those of the command, then those of each group."""
    job = without_hydra(config)
    own = [key for key in job if not OmegaConf.is_dict(_raw(job, str(key)))]
    choices = {str(group): str(option) for group, option in config.hydra.runtime.choices.items()}
    groups = {group.split("/")[0] for group in choices}
    # Nodes without a config group, such as sampling, belong to the command, so they are shown first.
    nodes = sorted(
        (str(key) for key in job if key not in own and key not in _INTERNAL), key=lambda node: node in groups
    )
    yield "settings, KEY=VALUE (shown with the present value):"
    yield from _described(job, [str(key) for key in own], [command])
    for node in nodes:
        keys = list(leaves(job, node))
        if keys == [node]:
            continue  # an option without settings, such as evaluation=none
        chosen = [f"{group}={option}" for group, option in choices.items() if group.split("/")[0] == node]
        chosen.sort(key=lambda choice: "/" in choice.partition("=")[0])  # data before data/control
        summary = TEXTS.get(chosen[0], {}).get("", "") if chosen else ""
        yield ""
        yield from textwrap.wrap(f"{chosen[0] if chosen else node}: {summary}".rstrip(": ") + ":", _width())
        yield from _described(job, keys, [command, *chosen])


def _described(config: DictConfig, keys: Sequence[str], sources: Sequence[str]) -> Iterator[str]:
    for key in keys:
        text = next((TEXTS[source][key] for source in sources if TEXTS.get(source, {}).get(key)), None)
        yield from _columns(f"{key}={_shown(config, key)}", text or description(sources[0], key))


def description(command: str, key: str) -> str:
    """Description of ``key`` for ``command``, or in any option; empty if there is none."""
    return next((texts[key] for texts in (TEXTS.get(command, {}), *TEXTS.values()) if texts.get(key)), "")


def leaves(config: DictConfig, key: str) -> Iterator[str]:
    """Dotted keys of all settings in the node ``key``; ``key`` itself if it has none, or is a value."""
    node = _raw(config, key)
    if not OmegaConf.is_dict(node) or not node:
        yield key
        return
    for name in node:
        if not str(name).startswith("_"):
            yield from leaves(config, f"{key}.{name}")


def _raw(config: DictConfig, key: str) -> Any:
    """Value of ``key``; None if it is missing or cannot be interpolated."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def _shown(config: DictConfig, key: str) -> str:
    parent, _, name = key.rpartition(".")
    if OmegaConf.is_missing(_raw(config, parent) if parent else config, name):
        return "???"
    value = _raw(config, key)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def _columns(left: str, text: str, left_width: int = _LEFT) -> list[str]:
    """``left`` and the wrapped ``text`` in two columns; a long ``left`` has a line of its own."""
    indent = " " * (left_width + 2)
    lines = textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent, break_long_words=False)
    if len(left) + 2 >= left_width or not lines:
        return [f"  {left}", *lines]
    return [f"  {left:<{left_width}}{lines[0].strip()}", *lines[1:]]
