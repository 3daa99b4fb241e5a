"""``sdtune completion SHELL``: completion of commands, settings and paths, and the script that installs it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sdtune.cli.help import TEXTS, description, leaves, option_groups
from sdtune.config.compose import compose, search_path, without_hydra
from sdtune.config.hydra_compat import initialized
from sdtune.errors import UserError

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath

_HELP = """usage: sdtune completion bash|zsh|fish

Prints the script that lets the shell complete commands, settings and paths. Load it when the shell starts:

  bash   echo 'source <(sdtune completion bash)' >> ~/.bashrc
  zsh    echo 'source <(sdtune completion zsh)' >> ~/.zshrc      after the line with compinit
  fish   sdtune completion fish > ~/.config/fish/completions/sdtune.fish
"""

_BASH = r"""_sdtune() {
    local line=${COMP_LINE:0:COMP_POINT} candidate
    local word=${line##*[^\\][[:space:]]}
    word=${word//\\/}
    local rest=$word
    [[ $COMP_WORDBREAKS == *=* ]] && rest=${word##*=}
    COMPREPLY=()
    while IFS= read -r candidate; do
        candidate=${candidate#"${word%"$rest"}"}
        [[ $candidate == *[=/.] ]] && COMPREPLY+=("$(printf %q "$candidate")") \
            || COMPREPLY+=("$(printf %q "$candidate") ")
    done < <(SDTUNE_LINE=$line "${COMP_WORDS[0]}" completion query 2> /dev/null)
}
complete -o nospace -F _sdtune sdtune
"""

_ZSH = r"""_sdtune() {
    local -a candidates
    candidates=("${(@f)$(SDTUNE_LINE=$LBUFFER ${words[1]} completion query 2> /dev/null)}")
    compadd -S '' -- ${(M)candidates:#*[=/.]}
    compadd -- ${candidates:#*[=/.]}
}
compdef _sdtune sdtune
"""

_FISH = r"""function __sdtune
    set -lx SDTUNE_LINE (commandline --cut-at-cursor)
    set -l command (commandline --tokenize)[1]
    $command completion query 2> /dev/null
end
complete --command sdtune --no-files --arguments '(__sdtune)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

_PATHS = ("report", "import-kohya", "export", "evaluate", "caption", "mask")
"""Commands with a file or folder as their main argument."""
_WORDS = {"cache": ("older_than=", "max_gib="), "completion": tuple(_SCRIPTS)}
_OPTIONS = ("--help", "--multirun", "--config-dir", "--cfg", "--package", "--info", "--version")
_IS_OVERRIDE = re.compile(r"[+]{0,2}[\w./@-]+=.")
_VALUES = {"--cfg": ("job", "hydra", "all")}


def main(arguments: list[str], commands: Sequence[str]) -> None:
    """Print the script of a shell, or the completions of the line in the environment variable ``SDTUNE_LINE``.

    Args:
        arguments: ``bash``, ``zsh``, ``fish``, ``query``, or ``--help``.
        commands: names of all commands.

    Raises:
        UserError: the shell is unknown.
    """
    if arguments == ["query"]:
        for candidate in _candidates(os.environ.get("SDTUNE_LINE", ""), commands):
            print(candidate)
    elif arguments in (["-h"], ["--help"]):
        print(_HELP, end="")
    elif len(arguments) == 1 and arguments[0] in _SCRIPTS:
        print(_SCRIPTS[arguments[0]], end="")
    else:
        raise UserError(
            f"expected a shell, got {' '.join(arguments) or 'nothing'}",
            key="completion",
            remedy=f"use sdtune completion {'|'.join(_SCRIPTS)}",
        )


def _candidates(line: str, commands: Sequence[str]) -> list[str]:
    """Possible completions of the last word of ``line``; its first word is the program."""
    words = _split(line)[1:]
    word = "" if not words or line[-1:].isspace() else words.pop()
    if not words:
        return [name for name in commands if name.startswith(word)]
    command, previous = words[0], words[-1]
    if previous in ("-cd", "--config-dir"):
        return [path for path in _paths(word) if path.endswith("/")]
    if previous in _VALUES or word.startswith("-"):
        return [text for text in _VALUES.get(previous, _OPTIONS) if text.startswith(word)]
    found = [text for text in _WORDS.get(command, ()) if text.startswith(word)]
    if command in TEXTS:
        found += _settings(command, words[1:], word)
    key, equals, value = word.partition("=")
    if equals and not found and _takes_path(command, key):
        found = [f"{key}={path}" for path in _paths(value)]
    elif not equals and command in _PATHS:
        found = [*_paths(word), *found]
    return list(dict.fromkeys(found))


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # an open quote
        return line.split()


def _settings(command: str, overrides: Sequence[str], word: str) -> Iterator[str]:
    """Keys, groups and options that begin with ``word``, up to the next dot, and the values of a setting with few."""
    key, equals, value = word.partition("=")
    search = search_path(_config_dir(overrides))
    config = _composed(command, search, [text for text in overrides if _IS_OVERRIDE.match(text)])
    with initialized(command, search) as hydra:
        groups = option_groups(command, hydra.config_loader, config)
    if equals:
        values = groups.get(key) or _choices(command, key)
        yield from (f"{key}={name}" for name in values if name.startswith(value))
        return
    job = without_hydra(config)
    keys = [f"{name}=" for name in (*groups, *(leaf for node in job for leaf in leaves(job, str(node))))]
    for name in keys:
        if name.startswith(word):
            yield word + re.split(r"(?<=\.)", name.removeprefix(word))[0]


def _composed(command: str, search: ConfigSearchPath, overrides: list[str]) -> DictConfig:
    """The composed config; without the overrides, if they are not complete or not valid."""
    try:
        return compose(command, search, overrides)
    except (HydraException, OmegaConfBaseException, UserError):
        return compose(command, search, [])


def _config_dir(arguments: Sequence[str]) -> str | None:
    folders = [after for option, after in pairwise(arguments) if option in ("-cd", "--config-dir")]
    return folders[0] if folders and Path(folders[0]).is_dir() else None


def _choices(command: str, key: str) -> list[str]:
    """Values of a setting whose description ends with all of them, such as ``(epsilon or sample or null)``."""
    values = description(command, key).rpartition("(")[2].removesuffix(")").split(" or ")
    is_list = len(values) > 1 and all(re.fullmatch(r"\w+", value) for value in values) and "text" not in values
    return values if is_list else []


def _takes_path(command: str, key: str) -> bool:
    """Whether the value of ``key`` is a path, by its name and description."""
    return re.search(r"\b(file|folder)", f"{key.replace('_', ' ')} {description(command, key)}") is not None


def _paths(beginning: str) -> list[str]:
    """Files and folders whose path begins with ``beginning``; folders end with a slash."""
    folder, slash, name = beginning.rpartition("/")
    try:
        entries = sorted(Path(f"{folder}{slash}" or ".").expanduser().iterdir())
    except (OSError, RuntimeError):  # RuntimeError: the home folder of an unknown user
        return []
    shown = [entry for entry in entries if entry.name.startswith(name) and (name or not entry.name.startswith("."))]
    return [f"{folder}{slash}{entry.name}" + ("/" if entry.is_dir() else "") for entry in shown]
