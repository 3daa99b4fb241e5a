"""Entry point of ``sdtune <command> [Hydra overrides]``: selects the command and runs it.

``sys.argv`` is left unchanged, because Lightning repeats it to start the processes of other devices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from sdtune.output_streams import protect_output
from sdtune.suggest import suggestion


@dataclass(frozen=True)
class Command:
    """A command: summary for the help, module of its ``prepare`` function, and whether it writes a folder."""

    summary: str
    module: str
    writes: bool = True


COMMANDS = {
    "train": Command("fine-tune a model; writes a run folder", "sdtune.commands.train"),
    "prepare": Command(
        "create class images, caches and control maps of a training before its first step",
        "sdtune.commands.prepare",
    ),
    "caption": Command(
        "write captions of images with a captioning or tagging model", "sdtune.commands.caption", writes=False
    ),
    "mask": Command("write masks of what words describe in images", "sdtune.commands.mask", writes=False),
    "sample": Command("generate images with adapters at any strength", "sdtune.commands.sample"),
    "plan": Command("estimate memory and compute of a training, without weights", "sdtune.commands.plan", writes=False),
    "export": Command("export the artifact of a run in the format of another program", "sdtune.commands.export"),
    "evaluate": Command("measure the artifact of a finished run", "sdtune.commands.evaluate"),
    "report": Command("write an HTML report of a run, a sweep, or any folder of runs", "sdtune.commands.report"),
    "index": Command(
        "write a table of samples from folders, parquet, CSV, JSONL, datasets folders or tars", "sdtune.commands.index"
    ),
    "import-kohya": Command(
        "print the sdtune command of a configuration of kohya's sd-scripts", "sdtune.cli.import_kohya"
    ),
    "doctor": Command(
        "show versions, devices, memory and disks, and what is wrong with them", "sdtune.commands.doctor"
    ),
    "cache": Command("show the size of the cache, and remove entries", "sdtune.commands.cache"),
    "completion": Command("print the completion script of bash, zsh or fish", "sdtune.cli.completion"),
}

_WITHOUT_CONFIG = ("report", "index", "import-kohya", "doctor", "cache", "completion")
"""Commands without Hydra's settings."""

_HELP = """usage: sdtune <command> [Hydra overrides]
       sdtune report FOLDER [--follow] [--serve]
       sdtune index SOURCE... out=FILE.arrow
       sdtune import-kohya CONFIG.toml [DATASET.toml]
       sdtune doctor
       sdtune cache [older_than=DAYS] [max_gib=GIB]
       sdtune completion bash|zsh|fish

commands:
{commands}

  sdtune train                                  a LoRA on the shipped pocket backbone and subject
  sdtune train experiment=NAME                  a recipe of experiments/
  sdtune train method=lora data=folder data.path=DIR data.prompt="a photo of sks otter"
  sdtune plan methods=all backbone=sd15 fits=12 which methods fit a GPU of 12 GiB
  sdtune <command> --help                       config groups, and each setting explained
  sdtune <command> --cfg job                    the composed config
"""


def main() -> None:
    """Console entry point."""
    protect_output()
    _set_allocator()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        summaries = "\n".join(f"  {name:<14}{command.summary}" for name, command in COMMANDS.items())
        print(_HELP.format(commands=summaries), end="")
        return
    if arguments[0] in ("-V", "--version"):
        _print_version()
        return
    name, *overrides = arguments
    if name not in COMMANDS:
        from sdtune.cli.exit_codes import refuse
        from sdtune.cli.kohya_options import SCRIPTS

        own = SCRIPTS.get(name.removesuffix(".py"))
        if own is None:
            refuse(f"{name}: unknown command{suggestion(name, COMMANDS)}")
        refuse(f"{name}: unknown command; use sdtune {own}{_translated_options(own, overrides)}")
    if name in _WITHOUT_CONFIG:
        from sdtune.cli.exit_codes import exit_codes

        with exit_codes(name):
            _command_without_config(name)(overrides)
        return
    if overrides in (["--version"], ["-V"]):  # Hydra would print its own version
        _print_version()
        return
    from sdtune.cli.launch import launch, lazy_command
    from sdtune.paths import cache_in_use

    command = COMMANDS[name]
    with cache_in_use() if command.writes else nullcontext():
        launch(name, overrides, lazy_command(command.module), rewrite=_argument_rewriter(name), writes=command.writes)


def _command_without_config(name: str) -> Callable[[list[str]], None]:
    if name == "import-kohya":
        from sdtune.cli.import_kohya import main as import_kohya

        return import_kohya
    if name == "completion":
        from sdtune.cli.completion import main as completion

        return lambda arguments: completion(arguments, tuple(COMMANDS))
    if name == "cache":
        from sdtune.commands.cache import main as cache

        return cache
    if name == "index":
        from sdtune.commands.index import main as index

        return index
    if name == "doctor":
        from sdtune.commands.doctor import main as doctor

        return doctor
    from sdtune.commands.report import main as report

    return report


def _set_allocator() -> None:
    """Let torch's CUDA allocator extend its segments, which reduces fragmentation; read when torch is imported."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    from importlib.metadata import version

    major, minor = (int(part) for part in version("torch").split(".")[:2])
    name = "PYTORCH_ALLOC_CONF" if (major, minor) >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF"
    os.environ[name] = "expandable_segments:True"


def _print_version() -> None:
    from importlib.metadata import version

    print(version("sdtune"))


def _argument_rewriter(name: str) -> Callable[[list[str]], list[str]]:
    """Function that transforms the arguments before Hydra parses them; only ``train`` has one, for ``resume=``."""
    if name != "train":
        return list
    from sdtune.cli.resume import rewrite

    return rewrite


def _translated_options(command: str, arguments: Sequence[str]) -> str:
    """Text that names the overrides for the kohya options in ``arguments``; empty without such options."""
    from sdtune.cli.messages import check_option_names
    from sdtune.errors import UserError

    try:
        check_option_names(arguments, command, ())
    except UserError as error:
        return f"; {error}"
    return ""
