"""Grid of the same images at several LoRA strengths, to choose a strength."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.images.grids import grid, save_png
from sdtune.loaders.artifact import artifacts_applied
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels, generate_images

log = logging.getLogger("sdtune")

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COLUMNS = 4


def strength_grid(models: RunModels, requests: Sequence[Request], sampling: Sampling, folder: Path) -> None:
    """Write ``folder/strengths.png``: one row per strength, one column for each of the first four requests.

    Strength 0 is the base model with the learned embeddings of the new tokens. Writes nothing without a LoRA.
    """
    if not (models.artifact / FILE_NAME).is_file():
        return
    shown = requests[:_COLUMNS]
    with models.base() as backbone:
        loaded = load_adapters(backbone, [AdapterFile(str(models.artifact))], models.source)
        rows = []
        for strength in STRENGTHS:
            with artifacts_applied(backbone, loaded, strength, only_to_draw=True):
                rows.append(generate_images(backbone, shown, sampling))
    labels = [f"strength {strength:g}" for strength in STRENGTHS]
    save_png(grid(rows, labels, [request.prompt for request in shown]), folder / "strengths.png")
    prompts = {request.prompt for request in requests}
    if hidden := len(prompts - {request.prompt for request in shown}):
        log.info("strengths.png: does not show %d of %d prompts", hidden, len(prompts))
