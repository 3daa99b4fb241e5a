"""``sdtune.train()`` and ``sdtune.plan()``: commands from Python and Jupyter, which leave the process as it was."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtune.cli.as_typed import for_hydra
from sdtune.cli.launch import CheckedJob, check_hydra_settings, check_secrets, checked_job, lazy_command, run_job
from sdtune.cli.messages import check_option_names, composition_error
from sdtune.cli.resume import rewrite
from sdtune.config.compose import compose, search_path
from sdtune.config.hydra_compat import get_args_parser, option_names
from sdtune.errors import UserError
from sdtune.log_filters import restored_libraries
from sdtune.paths import cache_in_use
from sdtune.runs.hydra_values import as_current

if TYPE_CHECKING:
    from sdtune.commands.plan import Plan
    from sdtune.commands.trained_run import TrainedRun


def train(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> TrainedRun:
    """Train as ``sdtune train`` does, in this process.

    Progress is shown as in a terminal: a bar if the notebook has ipywidgets, else a few lines. An interrupt of the
    kernel (Ctrl-C) saves and stops the run; ``sdtune.train(["resume=RUN"])`` continues it.

    Args:
        overrides: as on the command line, such as ``["method.rank=4", "data=folder", "data.path=DIR"]``.
        config_dir: folder with config groups of your own (``-cd``).

    Returns:
        The run: its folder, metrics, images and curves.

    Raises:
        UserError: a setting is wrong, several values for a sweep, or several devices, which need the command line.
        Stopped: the run was interrupted; the message names the command that continues it.
    """
    typed = _checked_overrides(overrides, "train")
    with _unchanged_process(), cache_in_use():
        from sdtune.commands.trained_run import TrainedRun

        job = _checked_training(typed, config_dir)
        run_job(job)
        return TrainedRun(job.folder)


def _checked_training(typed: list[str], config_dir: str | Path | None) -> CheckedJob:
    check = lazy_command("sdtune.commands.train")

    def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
        _check_one_process(config)
        return check(config, folder)

    options = [] if config_dir is None else ["-cd", str(config_dir)]
    try:
        # A resumed run adds the --config-dir of its command line.
        arguments = get_args_parser().parse_args(rewrite(for_hydra("train", [*options, *typed])))
        return checked_job("train", search_path(arguments.config_dir), arguments.overrides, prepare)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(composition_error(error, "train", typed)) from error
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGINT:  # Ctrl-C while the settings are checked
            raise KeyboardInterrupt from stop
        raise


def _checked_overrides(overrides: Sequence[str], command: str) -> list[str]:
    """``overrides`` after the checks of the command line; options are refused."""
    if isinstance(overrides, str):
        raise UserError(f"got the text {overrides!r}", key="overrides", remedy=f"use a list, such as [{overrides!r}]")
    typed = [str(text) for text in overrides]
    if any(text in ("-m", "--multirun") for text in typed):
        raise UserError("sweeps need the command line", key="-m", remedy=f"use sdtune {command} {' '.join(typed)}")
    option = next((text for text in typed if text.startswith("-")), None)
    if option is not None:
        check_option_names(typed, command, option_names(get_args_parser()))
        raise UserError("options need the command line", key=option, remedy="write settings as KEY=VALUE")
    check_hydra_settings(typed)
    check_secrets(typed)
    return typed


def _check_one_process(config: DictConfig) -> None:
    from sdtune.config.hardware import process_count

    hardware = OmegaConf.to_container(config.hardware, resolve=True)
    assert isinstance(hardware, dict)
    if process_count({str(key): value for key, value in hardware.items()}) > 1:
        raise UserError(
            "several processes need the command line",
            key="hardware.devices",
            remedy="set hardware.devices=1, or use sdtune train",
        )


def plan(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Plan:
    """Estimate memory and compute as ``sdtune plan`` does; ``print`` shows the result, ``.figure()`` draws it.

    Args:
        overrides: as on the command line, such as ``["methods=lora,full", "backbone=sd15"]``.
        config_dir: folder with config groups of your own (``-cd``).

    Raises:
        UserError: a setting is wrong.
    """
    from sdtune.commands.plan import planned

    typed = _checked_overrides(overrides, "plan")
    with _unchanged_process():
        try:
            config = compose("plan", search_path(_folder(config_dir)), for_hydra("plan", typed))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(composition_error(error, "plan", typed)) from error
        with as_current(config):
            measure = planned(config)
        return measure()


def _folder(config_dir: str | Path | None) -> str | None:
    return None if config_dir is None else str(config_dir)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Context manager that restores what a command sets for its process: logging, warnings, environment, random states.

    Signal handlers, threads and torch's backends are restored by the command itself.
    """
    import numpy as np
    import torch

    root, handlers, level = logging.root, logging.root.handlers[:], logging.root.level
    environment, raises = dict(os.environ), logging.raiseExceptions
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with restored_libraries(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for handler in {*root.handlers} - {*handlers}:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.raiseExceptions = raises
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
