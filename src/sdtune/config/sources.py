"""Settings of the sources of ``data=mix``: kinds, and what they inherit from the mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sdtune.config.build import build
from sdtune.config.schema import check_node
from sdtune.data import ImageDataModule
from sdtune.data.mix import errors_of_source
from sdtune.errors import UserError
from sdtune.paths import config_folder
from sdtune.suggest import suggestion

_OF_THE_MIX = ("batch_size", "cache_latents", "cache_text", "workers", "seed", "sources")
"""Settings that only the whole mix has."""


def check_data(node: Mapping[str, Any], trust: Sequence[str]) -> None:
    """Check the config of the data (:func:`sdtune.config.schema.check_node`), and of each source of a mix.

    Raises:
        UserError: one line with the key, for the first mismatch.
    """
    check_node(with_targets(node), "data", trust, ("seed",))


def build_data(node: Mapping[str, Any], trust: Sequence[str], seed: int) -> ImageDataModule:
    """Build the data module of a checked config.

    Raises:
        UserError: settings contradict each other.
    """
    node = with_targets(node)
    if "sources" in node:
        sources = {}
        for name, source in node["sources"].items():
            with errors_of_source(name):
                sources[name] = build(source, trust)
        node = {**node, "sources": sources}
    data: ImageDataModule = build(node, trust, {"seed": seed})
    return data


def with_targets(node: Mapping[str, Any]) -> dict[str, Any]:
    """``node`` where each source of a mix has a ``_target_`` for its ``kind``, and the settings of the mix as defaults.

    Raises:
        UserError: a source is not a mapping, its kind is unknown, or it has a setting of the mix.
    """
    if not isinstance(node.get("sources"), Mapping):
        for setting in ("weight", "loss_weight"):
            if setting in node:
                raise UserError(
                    "is a setting of a source of data=mix", key=f"data.{setting}", remedy=f"remove data.{setting}"
                )
        return dict(node)
    inherited = {key: value for key, value in node.items() if key not in (*_OF_THE_MIX, "_target_")}
    caches_latents = bool(node.get("cache_latents", True))
    sources = {name: _source(str(name), own, inherited, caches_latents) for name, own in node["sources"].items()}
    return {**node, "sources": sources}


def _source(name: str, own: Any, inherited: Mapping[str, Any], caches_latents: bool) -> dict[str, Any]:
    key = f"data.sources.{name}"
    if not isinstance(own, Mapping):
        raise UserError(f"got {own!r}", key=key, remedy=f"set the settings of a source, such as {key}.path=DIR")
    for setting in _OF_THE_MIX:
        if setting in own:
            raise UserError(
                "belongs to the mix, not to one of its sources", key=f"{key}.{setting}", remedy=f"set data.{setting}"
            )
    settings = {**inherited, **{setting: value for setting, value in own.items() if setting != "kind"}}
    settings["cache_latents"] = caches_latents  # which a random crop excludes
    if isinstance(own.get("captions"), Mapping):
        settings["captions"] = {**inherited.get("captions", {}), **own["captions"]}
    if isinstance(own.get("control"), Mapping) and "option" in own["control"]:
        settings["control"] = _option("data/control", own["control"], f"{key}.control", "option")
    if "_target_" in own:
        return settings
    return {**_option("data", {"kind": own.get("kind", "folder")}, key, "kind"), **settings}


def _option(group: str, own: Mapping[str, Any], key: str, name_key: str) -> dict[str, Any]:
    """Settings of the option ``own[name_key]`` of a config group, without its defaults list, changed by ``own``."""
    name = own[name_key]
    options = sorted(file.stem for file in (config_folder() / group).glob("*.yaml") if file.stem not in ("base", "mix"))
    if name not in options:
        raise UserError(
            f"unknown {name_key} {name}{suggestion(str(name), options)}",
            key=f"{key}.{name_key}",
            remedy=f"use one of {', '.join(options)}",
        )
    values = yaml.safe_load((config_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = {setting: value for setting, value in values.items() if setting != "defaults"}
    return {**settings, **{setting: value for setting, value in own.items() if setting != name_key}}
