"""``sdtune.sample()``: generate images from Python, with adapters and ControlNets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdtune.backbone import Pretrained
from sdtune.backbone.families import POCKET_GUIDANCE
from sdtune.hardware.devices import device as device_of
from sdtune.hardware.precision import generation_dtype
from sdtune.loaders.artifact import ArtifactFile, artifacts_applied
from sdtune.loaders.controlnet import read_control_images
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.progress import track
from sdtune.sampling.load import load_to_generate
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.prompts import warn_about_truncated_prompts


def sample(
    prompt: str | Sequence[str],
    adapters: Sequence[dict[str, Any]] = (),
    *,
    control: str | Path | Sequence[dict[str, Any]] = (),
    control_image: str | Path | Image.Image | None = None,
    backbone: Pretrained | None = None,
    seeds: Sequence[int] = (0,),
    sampling: Sampling | None = None,
    device: str | None = None,
) -> list[Image.Image]:
    """Generate one image for each prompt and seed; all seeds of a prompt are adjacent.

    Args:
        prompt: one prompt or several.
        adapters: ``{"path": FILE, "strength": 0.8}`` for each; a path can also be the ``artifact`` folder of a run.
        control: the folder of a ControlNet, or ``{"path": NET, "image": FILE, "strength": 1.0, "preprocess": "canny"}``
            for each of several (:class:`sdtune.loaders.controlnet.ControlImage`); their residuals add up.
        control_image: an image or its file, for each ControlNet without ``"image"``.
        backbone: None: pocket.
        seeds: seeds of the initial noise.
        sampling: steps, guidance, size and sampler; None: defaults with the guidance of ``backbone``.
        device: torch device; None: a GPU if available, else ``cpu``.

    Returns:
        RGB images, ``len(prompts) * len(seeds)``.

    Raises:
        UserError: an adapter or a ControlNet is missing, damaged, or does not fit the backbone.
    """
    source = backbone or Pretrained(guidance=POCKET_GUIDANCE)
    files = [AdapterFile(str(a["path"]), float(a.get("strength", 1.0))) for a in adapters]
    controls = read_control_images([{"path": control}] if isinstance(control, str | Path) else control, control_image)
    groups: dict[str, Sequence[ArtifactFile]] = {"adapters": files, "control": controls}
    for key, entries in groups.items():
        for number, file in enumerate(entries):
            file.check(source, f"{key}[{number}].path")
    settings = sampling or Sampling(guidance=source.guidance)
    size = settings.size(source.facts.side)
    conditions = {name: value for image in controls for name, value in image.conditions(size).items()}
    torch_device = torch.device(device) if device else device_of("auto")
    loaded_backbone = load_to_generate(source, torch_device, generation_dtype(torch_device))
    artifacts = [artifact for image in controls for artifact in image.load(loaded_backbone, source)]
    artifacts += load_adapters(loaded_backbone, files, source)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    requests = [Request(text, seed, conditions) for text in prompts for seed in seeds]
    with artifacts_applied(loaded_backbone, artifacts):
        warn_about_truncated_prompts(loaded_backbone, [*prompts, settings.negative_prompt])
        generated = track("Generating images", generate(loaded_backbone, requests, settings), len(requests))
        return [Image.fromarray(pixels) for pixels in generated]
