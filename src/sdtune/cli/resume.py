"""Replace ``resume=RUN`` by the overrides and the folder of the run before Hydra composes the config."""

from __future__ import annotations

from pathlib import Path

from sdtune.config.overrides import AUTO, folder_override, parsed, resumed_folder
from sdtune.errors import UserError
from sdtune.hardware.processes import is_launched_again, is_torchrun
from sdtune.quoting import override, shell_override
from sdtune.runs.compare import last_start, may_change, saved_config_dir
from sdtune.runs.hydra_values import saved_overrides

_CONFIG_DIR = ("-cd", "--config-dir")
_WITH_VALUE = (*_CONFIG_DIR, "-c", "--cfg", "-p", "--package", "-i", "--info")


def rewrite(argv: list[str]) -> list[str]:
    """The arguments for a resumed run; ``argv`` unchanged without ``resume=``.

    Raises:
        UserError: the folder is not a run folder, or an override would change the run.
    """
    argv = _without_auto(argv)
    run = resumed_folder(argv)
    if run is None or any(a in ("-m", "--multirun") for a in argv):
        return argv  # with -m, sdtune.sweeps.sweep resumes a sweep
    file = run / ".hydra" / "overrides.yaml"
    if (run / "multirun.yaml").is_file():
        raise UserError(
            f"{run} is a sweep folder", key="resume", remedy=f"add -m: sdtune train -m {shell_override('resume', run)}"
        )
    if not file.is_file():
        raise _not_a_run(run)
    saved = saved_overrides(last_start(run), "resume")
    value_indices = {i + 1 for i, a in enumerate(argv) if a in _WITH_VALUE}
    # "~key" has no "=", but is an override too and must be checked.
    new = [a for i, a in enumerate(argv) if i not in value_indices and not a.startswith(("resume=", "-"))]
    options = [
        a for i, a in enumerate(argv) if (i in value_indices or a.startswith("-")) and not _is_config_dir(argv, i)
    ]
    known = {parsed(text) for text in saved}
    for text in new:
        allowed = may_change(text)
        if text.startswith("hydra.") and not (is_launched_again() or is_torchrun()):
            allowed = False  # only processes that Lightning or torchrun starts may set hydra.*
        if not allowed and parsed(text) not in known:
            raise UserError(
                f"{text.removeprefix('++')} is not allowed in a resumed run",
                key="resume",
                remedy="change only the number of steps, hardware, logger, callbacks, evaluation and moved paths",
            )
    folder = run.absolute()
    # Processes that Lightning starts for other devices repeat these arguments and set hydra.run.dir themselves.
    internal = [] if any(a.startswith("hydra.run.dir=") for a in argv) else _folders(folder)
    length = ("trainer.max_steps=", "trainer.epochs=")
    replaced = length if any(text.startswith(length) for text in new) else ()
    saved = [o for o in saved if not o.startswith(("resume=", *replaced))]
    return [*options, *_config_folder(run, argv), *saved, *new, override("resume", folder), *internal]


def _folders(run: Path) -> list[str]:
    """Overrides that set the output folder to ``run``, and a new folder of Hydra in it."""
    number = 1
    while (run / ".hydra" / f"resume-{number}").exists():
        number += 1
    return [override("hydra.run.dir", run), f"hydra.output_subdir=.hydra/resume-{number}"]


def _not_a_run(path: Path) -> UserError:
    if not path.exists():
        return UserError(f"{path} does not exist", key="resume", remedy="name the folder of a run")
    parent = next((p for p in path.absolute().parents if (p / ".hydra" / "overrides.yaml").is_file()), None)
    remedy = "name the folder of a run" if parent is None else f"use {shell_override('resume', parent)}"
    return UserError(f"{path} is not a run folder (.hydra/overrides.yaml is missing)", key="resume", remedy=remedy)


def _without_auto(argv: list[str]) -> list[str]:
    """``argv`` with ``resume=auto`` replaced by the run or sweep folder that the arguments name, or removed.

    A run starts, continues from its checkpoint or, if it is complete, ends the process with exit code 0. So a job that
    a scheduler starts again can repeat its command.

    Raises:
        UserError: the arguments name no folder.
    """
    if AUTO not in argv:
        return argv
    is_sweep = any(a in ("-m", "--multirun") for a in argv)
    key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    folder = folder_override(argv, key)
    if folder is None or "${" in str(folder):
        raise UserError("required with resume=auto, without interpolations", key=key, remedy=f"set {key}=DIR")
    rest = [a for a in argv if a != AUTO]
    if is_sweep:
        return [*rest, override("resume", folder)] if (folder / "multirun.yaml").is_file() else rest
    without_folder = [a for a in rest if not a.startswith("hydra.run.dir=")]
    # .hydra/ is no sign of an earlier start: under torchrun, another process may have written it a moment ago.
    has_checkpoint = any(folder.glob("checkpoints/step*.ckpt"))
    if (folder / "metrics.json").is_file():
        if _adds_nothing(folder, without_folder):
            print(f"sdtune: {folder} is complete")
            raise SystemExit(0)
        if not has_checkpoint:
            raise UserError(
                f"{folder} contains a complete run without checkpoints",
                key=key,
                remedy="use another folder to train again",
            )
    if not has_checkpoint:
        return argv  # the command then allows the folder of a start that ended before its first checkpoint
    internal = [override("hydra.run.dir", folder)] if is_launched_again() or is_torchrun() else []
    return [*without_folder, override("resume", folder), *internal]


def _adds_nothing(run: Path, argv: list[str]) -> bool:
    """Whether all overrides in ``argv`` are those of the last start of ``run``."""
    known = {parsed(text) for text in saved_overrides(last_start(run), "resume")}
    return all(parsed(a) in known for a in argv if "=" in a and not a.startswith("-"))


def _is_config_dir(argv: list[str], index: int) -> bool:
    """Whether the argument at ``index`` is ``--config-dir`` or its value; ``_config_folder`` adds them."""
    return argv[index].split("=")[0] in _CONFIG_DIR or (index > 0 and argv[index - 1] in _CONFIG_DIR)


def _config_folder(run: Path, argv: list[str]) -> list[str]:
    """The ``--config-dir`` option of ``argv``, or else that of the first start of ``run``."""
    for index, argument in enumerate(argv):
        if argument in _CONFIG_DIR:
            return argv[index : index + 2]
        if argument.startswith(("-cd=", "--config-dir=")):
            return [argument]
    folder = saved_config_dir(run)
    return [] if folder is None else ["-cd", folder]
