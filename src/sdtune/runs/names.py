"""Label of a sweep's run."""

from __future__ import annotations

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf


def label_and_sweep(run: Path) -> tuple[str, str | None]:
    """What sets ``run`` apart from its sweep's other jobs, or its folder's name; and the sweep's folder's name."""
    kept, file = run / ".hydra" / "overrides.yaml", run.parent / "multirun.yaml"
    if not file.is_file() or not kept.is_file():
        return run.name, None
    master = OmegaConf.load(file)
    parsed = OverridesParser.create().parse_overrides([str(o) for o in master.hydra.overrides.task])
    varied = {o.get_key_element() for o in parsed if o.is_sweep_override()} | set(master.hydra.sweeper.params or {})
    own = [str(o) for o in OmegaConf.load(kept) if str(o).split("=", 1)[0] in varied]
    return " ".join(own) or run.name, run.parent.name
