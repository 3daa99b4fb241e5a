"""``sdtune <command> [Hydra overrides]`` runs module ``sdtune.<command>`` as ``__main__``.

So the command line that Lightning replays for another device is ``python -m sdtune.<command>``, argument for argument.
"""

from __future__ import annotations

import os
import runpy
import sys

from sdtune.suggest import suggestion

COMMANDS = {
    "train": "train an adapter and leave a run's folder behind",
    "prepare": "make what a training needs before its first step: class pictures, caches, control maps",
    "sample": "make pictures, with adapters at strengths chosen now",
    "plan": "what a training will cost, before anything is loaded",
    "export": "what a run has left, in the form that another program reads",
    "evaluate": "measure a finished run's artifact, before and after",
    "report": "one page of a run, a sweep, or any folder of runs",
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
        print(_HELP.format(commands="\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())), end="")
        return
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("sdtune"))
        return
    if arguments[0] in ("-sc", "--shell-completion"):
        _complete()
        return
    command = arguments.pop(0)
    if command not in COMMANDS:
        print(f"sdtune: {command}: there is no such command{suggestion(command, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(f"sdtune.{command}", run_name="__main__", alter_sys=True)


def _complete() -> None:
    """Hydra's completion, for the command that the line names; the commands themselves before there is one.

    ``eval "$(sdtune -sc install=bash)"`` installs it; the shell then asks with the line in ``COMP_LINE``.
    """
    from sdtune.launch import main as launch

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    named = words[1] if len(words) > 1 else ""
    if line and (named not in COMMANDS or line.endswith(named)):
        print(" ".join(name for name in COMMANDS if name.startswith(named)))
        return
    # Hydra would take the command for an override.
    os.environ["COMP_LINE"] = line.replace(f" {named} ", " ", 1)
    launch(named or "train", lambda config, folder: lambda composed: None)


if __name__ == "__main__":
    main()
