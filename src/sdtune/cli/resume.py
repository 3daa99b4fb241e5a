"""Replace ``resume=RUN`` by the overrides and the folder of the run before Hydra composes the config."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from sdtune.config.overrides import resumed_folder
from sdtune.errors import UserError
from sdtune.hardware.processes import is_launched_again, is_torchrun
from sdtune.quoting import override, shell_override
from sdtune.runs.compare import MAY_CHANGE, last_start, saved_config_dir

_CONFIG_DIR = ("-cd", "--config-dir")
_WITH_VALUE = (*_CONFIG_DIR, "-c", "--cfg", "-p", "--package", "-i", "--info")


def rewrite(argv: list[str]) -> list[str]:
    """The arguments for a resumed run; ``argv`` unchanged without ``resume=``.

    Raises:
        UserError: the folder is not a run folder, or an override would change the run.
    """
    run = resumed_folder(argv)
    if run is None or any(a in ("-m", "--multirun") for a in argv):
        return argv  # with -m, sdtune.sweeps.sweep resumes a sweep
    file = run / ".hydra" / "overrides.yaml"
    if (run / "multirun.yaml").is_file():
        raise UserError(
            f"{run} is a sweep folder", key="resume", remedy=f"add -m: sdtune train -m {shell_override('resume', run)}"
        )
    if not file.is_file():
        raise UserError(f"{run} is not a run folder (.hydra/overrides.yaml is missing)", key="resume")
    saved = [str(text) for text in OmegaConf.load(last_start(run) / "overrides.yaml")]
    value_indices = {i + 1 for i, a in enumerate(argv) if a in _WITH_VALUE}
    # "~key" has no "=", but is an override too and must be checked.
    new = [a for i, a in enumerate(argv) if i not in value_indices and not a.startswith(("resume=", "-"))]
    options = [
        a for i, a in enumerate(argv) if (i in value_indices or a.startswith("-")) and not _is_config_dir(argv, i)
    ]
    for text in new:
        allowed = text.lstrip("+~").startswith(MAY_CHANGE)
        if text.startswith("hydra.") and not (is_launched_again() or is_torchrun()):
            allowed = False  # only processes that Lightning or torchrun starts may set hydra.*
        if not allowed and text not in saved:
            raise UserError(
                f"{text} is not allowed in a resumed run",
                key="resume",
                remedy="change only trainer.max_steps, hardware, logger, and settings of callbacks",
            )
    number = 1
    while (run / ".hydra" / f"resume-{number}").exists():
        number += 1
    folder = run.absolute()
    # Processes that Lightning starts for other devices repeat these arguments and set hydra.run.dir themselves.
    internal = [override("hydra.run.dir", folder), f"hydra.output_subdir=.hydra/resume-{number}"]
    if any(a.startswith("hydra.run.dir=") for a in argv):
        internal = []
    saved = [o for o in saved if not o.startswith("resume=")]
    return [*options, *_config_folder(run, argv), *saved, *new, override("resume", folder), *internal]


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
