"""One-line messages for errors of Hydra and OmegaConf while a config is composed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from sdtune.cli.kohya_options import explanation, is_replaced
from sdtune.config.hydra_compat import full_key
from sdtune.config.overrides import resumed_folder
from sdtune.errors import UserError
from sdtune.quoting import shell_override
from sdtune.runs.compare import NOT_RESUMABLE_REMEDY, flat
from sdtune.suggest import closest_match, suggestion

_TEXTS = ("prompt", "name", "trigger", "path")
"""Ends of the keys whose values may contain spaces."""

_FOLDER_SETTINGS = ("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path")


def composition_error(error: Exception, command: str, typed: Sequence[str]) -> str:
    """One-line message for an error in the arguments ``typed`` of ``command``, or in the overrides of a resumed run."""
    line = _one_line(error, command, typed)
    resumed, key = resumed_folder(typed), re.split("[:=]", line)[0]
    if resumed is None or any(word.lstrip("+~").startswith(key) for word in typed):
        return line
    return f"{line}; {shell_override('resume', resumed)} repeats this override; {NOT_RESUMABLE_REMEDY}"


def _one_line(error: Exception, command: str, typed: Sequence[str]) -> str:
    for cause in _causes(error):
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return _unknown_setting(cause, typed, command)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            return f"{group}={name}: unknown option{suggestion(name, cause.options or ())}"
        if isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            if value.startswith(("[", "{")) and str(cause.override) in typed:
                if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
                    return f"{key}: the shell has split the value; put the override in single quotes"
                return f"{key}: cannot parse {value}; put its texts in double quotes and the override in single quotes"
            if "=" not in str(cause.override):
                return _split_text(key, typed) or f"{key}: the value is missing; write {key}=VALUE"
            remedy = f"quote it for Hydra and the shell: {shell_override(key, value)}"
            return f"{key}: cannot parse {value}; {remedy}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{'; '.join(lines[:2])}; check the overrides ({' '.join(typed)})"


def _split_text(word: str, typed: Sequence[str]) -> str | None:
    """Message for a ``word`` without ``=`` that is part of an unquoted text; None if it follows no override."""
    for start, text in enumerate(typed):
        key, equals, value = text.partition("=")
        if not equals or key.startswith("-") or not key.endswith(_TEXTS):
            continue
        rest = list(takewhile(lambda other: "=" not in other and not is_option(other), typed[start + 1 :]))
        if word in rest:
            quoted = shell_override(key, " ".join([value, *rest]))
            return f"{key}: the shell has split the text at its spaces; quote it for Hydra and the shell: {quoted}"
    return None


def is_option(word: str) -> bool:
    """Whether an argument is an option; a single dash is a part of a text that the shell has split."""
    return word.startswith("-") and word != "-"


def check_option_names(argv: Sequence[str], command: str, known: Sequence[str]) -> None:
    """Refuse options that Hydra does not have, such as ``--network_dim=8``; ``known`` are Hydra's options.

    argparse would read ``-rank=8`` as ``-r`` with the value ``ank=8``.

    Raises:
        UserError: an option is unknown.
    """
    words, has_unknown = [], False
    for word, following in itertools.pairwise([*argv, "-"]):
        name = re.split(r"[=\s]", word)[0]
        if is_option(word) and name not in known:
            has_value = word == name and "=" not in following and not following.startswith("-")
            words.append(f"{word} {following}" if has_value else word)
            has_unknown = True
        elif is_replaced(word, command):
            words.append(word)
    if has_unknown:
        explained = explanation(words, command)
        raise UserError(explained if explained is not None else _unknown_option(words[0], known))


def _unknown_option(word: str, known: Sequence[str]) -> str:
    option = re.split(r"[=\s]", word)[0]
    # Of the short names, even the most similar one usually means something else.
    match = closest_match(option, [name for name in known if name.startswith("--")], cutoff=0.8)
    if match is not None:
        return f"{option}: unknown option; did you mean {match}?"
    return f"{option}: unknown option; write settings as KEY=VALUE, without dashes"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_setting(error: ConfigAttributeError | ConfigKeyError, typed: Sequence[str], command: str) -> str:
    known = str(error.full_key)  # ends at the first part that is unknown
    keys = (word.split("=", 1)[0].lstrip("+~") for word in typed)
    full = next((key for key in keys if key.startswith(f"{known}.")), known)
    if full in _FOLDER_SETTINGS:
        return f"{full}: not a setting of this data group; for your own images set data=folder"
    if any(word.lstrip("+~").startswith(f"{full}=") and is_replaced(word, command) for word in typed):
        explained = explanation([word for word in typed if is_replaced(word, command)], command)
        assert explained is not None
        return explained
    if full == "trainer.max_epochs" and isinstance(error.parent_node, DictConfig):
        return f"{full}: unknown setting; set trainer.max_steps (a training prints the steps per epoch)"
    return f"{full}: unknown setting{_suggested_key(full, error.parent_node)}"


def _suggested_key(full: str, node: Any) -> str:
    """Suggestion for the first unknown part of ``full`` among the keys of ``node``."""
    if not isinstance(node, DictConfig) or not node:  # OmegaConf gives an empty node for the value of a setting
        return f"; set {full.rpartition('.')[0]}, which contains no other settings"
    known, parts = [str(key) for key in node], full.split(".")
    nested = _settings_named(full, node) if len(parts) == 1 else []
    if nested:
        return f"; did you mean {' or '.join(nested)}?"
    parent_key = full_key(node)
    depth = len(parent_key.split(".")) if parent_key else 0
    depth = min(depth, len(parts) - 1)
    match = closest_match(parts[depth], known)
    if match is None:
        return suggestion(parts[depth], known)
    return f"; did you mean {'.'.join([*parts[:depth], match, *parts[depth + 1 :]])}?"


def _settings_named(name: str, config: DictConfig) -> list[str]:
    """Keys of at most three settings ``GROUP.name`` of ``config``, those with the fewest parts."""
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    keys = [key for key in flat(container) if key.endswith(f".{name}") and not key.startswith("hydra.")]
    depth = min((key.count(".") for key in keys), default=0)
    return sorted(key for key in keys if key.count(".") == depth)[:3]
