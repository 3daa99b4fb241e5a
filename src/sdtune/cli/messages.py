"""One-line messages for errors of Hydra and OmegaConf while a config is composed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from sdtune.cli.kohya_options import TEXT_KEYS, WITH_ASSIGNMENTS, assigned, explanation, is_replaced
from sdtune.config.hydra_compat import full_key
from sdtune.config.overrides import resumed_folder
from sdtune.errors import UserError
from sdtune.quoting import in_quotes, shell_override, shell_word
from sdtune.runs.compare import NOT_RESUMABLE_REMEDY, flat
from sdtune.suggest import closest_match, suggestion

_FOLDER_SETTINGS = (
    *("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path"),
    *("data.damaged", "data.rehash"),
)
_SOURCE_SETTINGS = (*_FOLDER_SETTINGS, "data.weight", "data.loss_weight")


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
            beginning = max((o for o in cause.options or () if name.startswith(f"{o}_")), key=len, default=None)
            advice = suggestion(name, cause.options or ()) if beginning is None else f"; did you mean {beginning}?"
            return f"{group}={name}: unknown option{advice}"
        if isinstance(cause, OverrideParseException):
            return _unparsable(str(cause.override), typed)
        if group := re.match(r"Could not override '([\w/]+)'\. No match in the defaults list", str(cause)):
            return (
                f"{group[1]}: sdtune {command} has no such config group; see sdtune {command} --help for its settings"
            )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{'; '.join(lines[:2])}; check the overrides ({' '.join(typed)})"


def _unparsable(override: str, typed: Sequence[str]) -> str:
    """Message for an ``override`` that Hydra cannot parse."""
    key, equals, value = override.partition("=")
    if key.endswith("+"):
        return f"{key[:-1]}: += does not add to a list; write the complete list: '{key[:-1]}=[FIRST,{value}]'"
    following = list(typed[typed.index(override) + 1 :]) if override in typed else []
    words = list(takewhile(lambda word: _is_text(word) or word == "=", following))
    words = [word for word in words if word != "="]
    if not equals and key.endswith(".toml"):
        return f"{key}: sdtune reads no TOML; for a configuration of kohya's scripts use sdtune import-kohya {key}"
    if not equals:
        previous = typed[typed.index(override) - 1] if override in typed else ""
        if re.fullmatch(r"[\w.+-]+=[\d.e+-]+,?", previous) and re.fullmatch(r"[\d.e+-]+", key):
            name, _, first = previous.partition("=")
            return f"{name}: the shell has split the value at its spaces; write {name}={first.rstrip(',')},{key}"
        example = assigned(key, " ".join(words)) if words else f"{key}=VALUE"
        is_key = re.fullmatch(r"\w+(\.\w+)+", key) is not None
        split = None if is_key else _split_text(key, typed)
        return split or f"{key}: the value is missing; write {example}"
    if value.startswith(("[", "{")) and override in typed:
        whole = joined_brackets([override, *following])[0]
        if whole != override:
            return f"{key}: the shell has split the value; put it in single quotes: {shell_word(whole)}"
        corrected = f"{key}={_with_quoted_texts(value)}"
        if _can_be_parsed(corrected):
            return f"{key}: cannot parse {value}; write {shell_word(corrected)}"
        return f"{key}: cannot parse {value}; put its texts in double quotes and the override in single quotes"
    if value.endswith(",") and words and not key.endswith(TEXT_KEYS):
        return f"{key}: the shell has split the value at its spaces; write {assigned(key, value + ''.join(words))}"
    return f"{key}: cannot parse {value}; quote it for Hydra and the shell: {shell_override(key, value)}"


def _is_text(word: str) -> bool:
    """Whether ``word`` is neither an option, nor an override, nor a dotted key."""
    return _is_bare(word) and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", word) is None


def joined_brackets(words: Sequence[str]) -> list[str]:
    """``words``, with those joined that the shell has split inside a list or a mapping: ``a=[{b:``, ``X}]``."""
    joined: list[str] = []
    depth = 0
    for word in words:
        joined[-1:] = [f"{joined[-1]} {word}"] if depth > 0 else [*joined[-1:], word]
        value = joined[-1].partition("=")[2]
        depth = sum(value.count(c) for c in "[{") - sum(value.count(c) for c in "]}") if value[:1] in ("[", "{") else 0
    return joined


def _with_quoted_texts(value: str) -> str:
    """``value``, a list or a mapping, with double quotes around each text that Hydra cannot parse without them."""

    def quoted(match: re.Match[str]) -> str:
        text = match[2].strip()
        return match[1] + (text if re.fullmatch(r"[\w./+-]+", text) else in_quotes(text))

    return re.sub(r"([:\[,]\s*)([^\s\"'\[\]{},:][^\"'\[\]{},:]*)(?=\s*[,\]}])", quoted, value)


def _can_be_parsed(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _split_text(word: str, typed: Sequence[str]) -> str | None:
    """Message for a ``word`` without ``=`` that is part of an unquoted text; None if it follows no override."""
    for start, text in enumerate(typed):
        key, equals, value = text.partition("=")
        if not equals or key.startswith("-") or not key.endswith(TEXT_KEYS):
            continue
        rest = list(takewhile(_is_bare, typed[start + 1 :]))
        if word in rest:
            quoted = shell_override(key, " ".join([value, *rest]))
            if key.startswith("data.") and not any(text.startswith(("data=", "experiment=")) for text in typed):
                quoted = f"data=folder {quoted}"
            return f"{key}: the shell has split the text at its spaces; quote it for Hydra and the shell: {quoted}"
    return None


def is_option(word: str) -> bool:
    """Whether an argument is an option; a single dash is a part of a text that the shell has split."""
    return word.startswith("-") and word != "-"


def _is_argument(word: str) -> bool:
    return not is_option(word)


def _is_bare(word: str) -> bool:
    return not is_option(word) and "=" not in word


def check_option_names(argv: Sequence[str], command: str, known: Sequence[str]) -> None:
    """Refuse options that Hydra does not have, such as ``--network_dim=8``; ``known`` are Hydra's options.

    argparse would read ``-rank=8`` as ``-r`` with the value ``ank=8``.

    Raises:
        UserError: an option is unknown.
    """
    words, has_unknown = [], False
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        name = re.split(r"[=\s]", word)[0]
        if is_option(word) and name not in known:
            is_value = _is_argument if name.lstrip("-").replace("-", "_") in WITH_ASSIGNMENTS else _is_bare
            values = list(takewhile(is_value, remaining))
            del remaining[: len(values)]
            words.append(" ".join([word, *values]))
            has_unknown = True
        elif is_replaced(word, command):
            words.append(word)
            # Hydra would read a sweep, or could not parse it.
            has_unknown = has_unknown or "," in word or word.count("=") > 1
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
    if full in _SOURCE_SETTINGS and "data=mix" in typed:
        return f"{full}: a setting of each source of the mix; set {full.replace('data.', 'data.sources.NAME.')}"
    if full in _FOLDER_SETTINGS:
        return f"{full}: not a setting of this data group; for your own images set data=folder"
    if any(word.lstrip("+~").startswith(f"{full}=") and is_replaced(word, command) for word in typed):
        explained = explanation([word for word in typed if is_replaced(word, command)], command)
        assert explained is not None
        return explained
    if full == "trainer.max_epochs" and isinstance(error.parent_node, DictConfig):
        return f"{full}: unknown setting; set trainer.epochs or trainer.max_steps"
    return _several_unknown(typed, error.parent_node) or (
        f"{full}: unknown setting{_suggested_key(full, error.parent_node)}"
    )


def _several_unknown(typed: Sequence[str], config: Any) -> str | None:
    """Message for several overrides such as ``rank=8 lr=1e-4`` that name only the last part of a key; else None."""
    pairs = [word.partition("=") for word in typed if re.match(r"\w+=", word)]
    unknown = [(name, value) for name, _, value in pairs if isinstance(config, DictConfig) and name not in config]
    keys = {name: _settings_named(name, config) for name, _ in unknown}
    if len(unknown) < 2 or not all(len(found) == 1 for found in keys.values()):
        return None
    overrides = " ".join(assigned(keys[name][0], value) for name, value in unknown)
    return f"{', '.join(keys)}: unknown settings; did you mean {overrides}?"


def _suggested_key(full: str, node: Any) -> str:
    """Suggestion for the first unknown part of ``full`` among the keys of ``node``."""
    if not isinstance(node, DictConfig) or not node:  # OmegaConf gives an empty node for the value of a setting
        parent = full.rpartition(".")[0]
        return f"; {parent} contains no other settings: write {parent}=VALUE"
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
    """Keys of at most three settings ``GROUP.name`` of ``config``."""
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return sorted(key for key in flat(container) if re.fullmatch(rf"(?!hydra\.)\w+\.{name}", key))[:3]
