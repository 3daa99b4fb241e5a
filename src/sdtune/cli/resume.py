"""``resume=RUN``: replaced, before Hydra composes, by the run's own overrides and folder."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from sdtune.config.overrides import resumed_folder
from sdtune.errors import UserError
from sdtune.hardware.processes import is_launched_again, is_torchrun
from sdtune.quoting import override, shell_override
from sdtune.runs.compare import MAY_CHANGE, last_start, own_config_folder

_FOLDER = ("-cd", "--config-dir")
_VALUED = (*_FOLDER, "-c", "--cfg", "-p", "--package", "-i", "--info")


def rewrite(argv: list[str]) -> list[str]:
    """The arguments for a resumed run; ``argv`` itself where nothing is resumed.

    Raises:
        UserError: where the folder holds no run, or an override would make it another run.
    """
    run = resumed_folder(argv)
    if run is None or any(a in ("-m", "--multirun") for a in argv):
        return argv  # with -m a sweep is resumed: see sdtune.sweeps.sweep
    kept = run / ".hydra" / "overrides.yaml"
    if (run / "multirun.yaml").is_file():
        raise UserError(
            f"{run} is a sweep's", key="resume", remedy=f"add -m: sdtune train -m {shell_override('resume', run)}"
        )
    if not kept.is_file():
        raise UserError(f"{run} holds no run (no .hydra/overrides.yaml)", key="resume", remedy="name the folder of one")
    own = [str(text) for text in OmegaConf.load(last_start(run) / "overrides.yaml")]
    values = {i + 1 for i, a in enumerate(argv) if a in _VALUED}
    # "~key" has no "=": an override like any other, and none is passed over in silence.
    fresh = [a for i, a in enumerate(argv) if i not in values and not a.startswith(("resume=", "-"))]
    asks = [a for i, a in enumerate(argv) if (i in values or a.startswith("-")) and not _names_folder(argv, i)]
    for text in fresh:
        free = text.lstrip("+~").startswith(MAY_CHANGE)
        if text.startswith("hydra.") and not (is_launched_again() or is_torchrun()):
            free = False  # only a process that Lightning or torchrun starts for another device is told Hydra's part
        if not free and text not in own:
            raise UserError(
                f"{text} would make it another run; only hardware, logger, callbacks and trainer.max_steps may change",
                key="resume",
            )
    number = 1
    while (run / ".hydra" / f"resume-{number}").exists():
        number += 1
    folder = run.absolute()
    # A process that Lightning starts for another device repeats these arguments, with Hydra's own added: those win.
    internal = [override("hydra.run.dir", folder), f"hydra.output_subdir=.hydra/resume-{number}"]
    if any(a.startswith("hydra.run.dir=") for a in argv):
        internal = []
    own = [o for o in own if not o.startswith("resume=")]
    return [*asks, *_config_folder(run, argv), *own, *fresh, override("resume", folder), *internal]


def _names_folder(argv: list[str], index: int) -> bool:
    """Whether the argument at ``index`` is ``--config-dir`` or its value; those come by ``_config_folder``."""
    return argv[index].split("=")[0] in _FOLDER or (index > 0 and argv[index - 1] in _FOLDER)


def _config_folder(run: Path, argv: list[str]) -> list[str]:
    """The user's config folder of the first start, where this one names none."""
    for index, argument in enumerate(argv):
        if argument in _FOLDER:
            return argv[index : index + 2]
        if argument.startswith(("-cd=", "--config-dir=")):
            return [argument]
    own = own_config_folder(run)
    return [] if own is None else ["-cd", own]
