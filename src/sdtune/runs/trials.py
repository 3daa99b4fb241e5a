"""Optuna study of a sweep, and the trials of its jobs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from sdtune.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.storages import JournalStorage

STUDY = "sweep"
JOURNAL = "optuna.journal"
"""File name of the Optuna journal in a sweep folder."""


def require_optuna() -> None:
    """Raise UserError if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("Optuna is not installed", key="sweep", remedy="pip install 'sdtune[sweeps]'")


def storage(sweep: Path) -> JournalStorage:
    """Journal storage of the study in the sweep folder; several processes may write it."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(sweep / JOURNAL)))


def job_trial(sweep: Path, number: int, pruner: optuna.pruners.BasePruner) -> optuna.Trial:
    """Trial of job ``number``, to report metrics to; ``pruner`` decides about pruning."""
    import optuna

    journal = storage(sweep)
    study = optuna.load_study(study_name=STUDY, storage=journal, pruner=pruner)
    return optuna.Trial(
        study, journal.get_trial_id_from_study_id_trial_number(journal.get_study_id_from_name(STUDY), number)
    )
