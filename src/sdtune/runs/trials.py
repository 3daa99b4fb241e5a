"""A sweep's Optuna study, and a job's trial in it."""

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
"""Of a sweep's folder."""


def require_optuna() -> None:
    """UserError where it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweep=optuna needs Optuna", remedy="pip install 'sdtune[sweeps]'")


def storage(sweep: Path) -> JournalStorage:
    """A log of the study in the sweep's folder, which several processes may write."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(sweep / JOURNAL)))


def own_trial(sweep: Path, number: int, pruner: optuna.pruners.BasePruner) -> optuna.Trial:
    """The trial of job ``number``, to report to, judged by ``pruner``."""
    import optuna

    place = storage(sweep)
    study = optuna.load_study(study_name=STUDY, storage=place, pruner=pruner)
    return optuna.Trial(
        study, place.get_trial_id_from_study_id_trial_number(place.get_study_id_from_name(STUDY), number)
    )
