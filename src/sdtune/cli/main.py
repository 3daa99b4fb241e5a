"""``sdtune <command> [Hydra overrides]``: finds the command and runs it.

``sys.argv`` stays as it is: Lightning starts a process for another device by repeating it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from sdtune.suggest import suggestion


@dataclass(frozen=True)
class Command:
    """What a command is for, and the module of its ``prepare``; ``writes``: whether it leaves a folder behind."""

    summary: str
    module: str
    writes: bool = True


COMMANDS = {
    "train": Command("train an adapter and leave a run's folder behind", "sdtune.commands.train"),
    "prepare": Command(
        "make what a training needs before its first step: class images, caches, control maps",
        "sdtune.commands.prepare",
    ),
    "sample": Command("make images, with adapters at strengths chosen now", "sdtune.commands.sample"),
    "plan": Command("what a training will cost, before anything is loaded", "sdtune.commands.plan", writes=False),
    "export": Command("what a run has left, in the form that another program reads", "sdtune.commands.export"),
    "evaluate": Command("measure a finished run's artifact, before and after", "sdtune.commands.evaluate"),
    "report": Command("one page of a run, a sweep, or any folder of runs", "sdtune.commands.report"),
}

_HELP = """usage: sdtune <command> [Hydra overrides]
       sdtune report FOLDER

commands:
{commands}

  sdtune train                                  a LoRA on the shipped pocket backbone and subject
  sdtune train experiment=NAME                  a recipe of experiments/
  sdtune train method=lora data=folder data.path=DIR data.prompt="a photo of sks otter"
  sdtune plan methods=all backbone=sd15 fits=12 which methods fit a GPU of 12 GiB
  sdtune <command> --help                       its groups and settings
  sdtune <command> --cfg job                    the composed config
"""


def main() -> None:
    """Console entry point."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        summaries = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
        print(_HELP.format(commands=summaries), end="")
        return
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("sdtune"))
        return
    if arguments[0] in ("-sc", "--shell-completion"):
        _complete(arguments)
        return
    name, *own = arguments
    if name not in COMMANDS:
        from sdtune.cli.exit_codes import refuse

        refuse(f"{name}: there is no such command{suggestion(name, COMMANDS)}")
    if name == "report":
        from sdtune.cli.exit_codes import exit_codes
        from sdtune.commands.report import main as report

        with exit_codes(name):
            report(own)
        return
    from sdtune.cli.launch import launch, lazy_command

    command = COMMANDS[name]
    launch(name, own, lazy_command(command.module), rewrite=_rewriting(name), writes=command.writes)


def _rewriting(name: str) -> Callable[[list[str]], list[str]]:
    """What becomes of the arguments of a command before Hydra sees them: ``resume=`` is a training's."""
    if name != "train":
        return list
    from sdtune.cli.resume import rewrite

    return rewrite


def _complete(arguments: list[str]) -> None:
    """Hydra's completion, for the command that the line names; the commands themselves before there is one.

    ``eval "$(sdtune -sc install=bash)"`` installs it; the shell then asks with the line in ``COMP_LINE``.
    """
    from sdtune.cli.launch import launch

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    named = words[1] if len(words) > 1 else ""
    if line and (named not in COMMANDS or line.endswith(named)):
        print(" ".join(name for name in COMMANDS if name.startswith(named)))
        return
    # Hydra would take the command for an override.
    os.environ["COMP_LINE"] = line.replace(f" {named} ", " ", 1)
    launch(named or "train", arguments, lambda config, folder: lambda composed: None)
