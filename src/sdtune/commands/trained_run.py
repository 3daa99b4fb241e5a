"""``TrainedRun``: a run folder from Python: metrics, images, curves, and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdtune.config.build import build
from sdtune.config.settings import read_saved_config
from sdtune.errors import UserError
from sdtune.exporting import find_artifact
from sdtune.files import read_json
from sdtune.reporting.charts import single_curve
from sdtune.reporting.collect import read_run
from sdtune.reporting.page import write_report
from sdtune.sampling.api import sample
from sdtune.sampling.loop import Sampling

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Args:
        folder: run folder.
    """

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        object.__setattr__(self, "folder", Path(folder).expanduser())

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``.

        Raises:
            UserError: the run is unfinished.
        """
        file = self.folder / "metrics.json"
        if not file.is_file():
            raise UserError(
                f"{self.folder} has no metrics.json, because the run is unfinished or not a run",
                key="run",
                remedy=f'continue it with sdtune.train(["resume={self.folder}"])',
            )
        return read_json(file, "run")

    def before_after(self) -> Image.Image | None:
        """Grid of the previews before and after training; None without previews (``callbacks.samples=null``)."""
        file = self.folder / "samples" / "before_after.png"
        if not file.is_file():
            return None
        with Image.open(file) as image:
            return image.copy()

    def curve(self, column: str = "loss", smoothing: float = 0.9) -> go.Figure:
        """Line chart of a column of ``metrics.csv`` over the optimizer steps.

        Args:
            column: such as ``loss``, ``validation_loss``, ``grad_norm`` or ``lr/denoiser``.
            smoothing: weight of the previous values in the exponential mean, in [0, 1); 0: no smoothing.

        Raises:
            UserError: the run has no such column.
        """
        return single_curve(read_run(self.folder).curves, column, smoothing)

    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        seeds: Sequence[int] = (0,),
        strength: float = 1.0,
        control_image: str | Path | Image.Image | None = None,
        sampling: Sampling | None = None,
        device: str | None = None,
    ) -> list[Image.Image]:
        """Generate images with the model and the artifact of the run, as ``sdtune sample run=RUN`` does.

        Args:
            prompt: one prompt or several.
            seeds: seeds of the initial noise.
            strength: of the adapter or the ControlNet.
            control_image: for a ControlNet: a control map, or its file.
            sampling: steps, guidance, size and sampler; None: defaults with the guidance of the model.
            device: torch device; None: a GPU if available, else ``cpu``.

        Returns:
            RGB images, ``len(prompts) * len(seeds)``.

        Raises:
            UserError: the run is unfinished, or its ControlNet has no image.
        """
        config = read_saved_config(self.folder)
        source = build(config["backbone"], tuple(config.get("trust") or ()))
        artifact = find_artifact(self.folder / "artifact", "run")
        if artifact.kind == "model":
            source = source.of_trained_pipeline(artifact.path)
        has_adapter = any((self.folder / "artifact").glob("*.safetensors"))
        return sample(
            prompt,
            [{"path": str(self.folder / "artifact"), "strength": strength}] if has_adapter else [],
            control=[{"path": str(artifact.path), "strength": strength}] if artifact.kind == "controlnet" else (),
            control_image=control_image,
            backbone=source,
            seeds=seeds,
            sampling=sampling,
            device=device,
        )

    def report(self) -> Path:
        """Write the HTML page of the run, as ``sdtune report RUN`` does, and return its path."""
        return write_report([read_run(self.folder)], self.folder, "/".join(self.folder.resolve().parts[-2:]))
