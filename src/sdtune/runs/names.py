"""Label of a run within its sweep."""

from __future__ import annotations

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from sdtune.files import read_yaml
from sdtune.runs.hydra_values import saved_overrides, unresolved


def label_and_sweep(run: Path) -> tuple[str, str | None]:
    """Label and sweep name of ``run``.

    The label is the overrides that the sweep varies, or the folder name; the sweep name is None outside of a sweep.
    """
    saved, file = run / ".hydra" / "overrides.yaml", run.parent / "multirun.yaml"
    if not file.is_file() or not saved.is_file():
        return run.name, None
    sweep = read_yaml(file)
    parsed = OverridesParser.create().parse_overrides(unresolved(sweep.hydra.overrides.task))
    varied = {o.get_key_element() for o in parsed if o.is_sweep_override()} | set(sweep.hydra.sweeper.params or {})
    overrides = [o for o in saved_overrides(saved.parent) if o.split("=", 1)[0] in varied]
    return " ".join(overrides) or run.name, run.parent.name
