"""``sdtune.sample()``: draw images in Python, with adapters and control maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdtune.backbone import Pretrained
from sdtune.backbone.families import POCKET_GUIDANCE
from sdtune.loaders.controlnet import check_controlnet, controlnets_applied, load_controlnets, read_control_image
from sdtune.loaders.lora import AdapterFile, adapters_applied, check_file, load_adapters
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.prompts import warn_of_cut_prompts


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
    """Images of each prompt with each seed, prompts outermost.

    Args:
        prompt: one or more.
        adapters: ``{"path": FILE, "strength": 0.8}`` each; a run's ``artifact`` folder is a path too.
        control: the folder of a ControlNet, or ``{"path": NET, "image": FILE, "strength": 1.0, "preprocess": "canny"}``
            for each of several (:class:`sdtune.loaders.controlnet.ControlImage`); their residuals add up.
        control_image: an image or its file, for each net that names no image of its own.
        backbone: pocket if None.
        seeds: one image per prompt and seed.
        sampling: steps, guidance, size, solver; the backbone's guidance if None.
        device: as in torch; an accelerator if there is one.

    Raises:
        UserError: for an adapter or a ControlNet that is missing, damaged, or does not fit the backbone.
    """
    source = backbone or Pretrained(guidance=POCKET_GUIDANCE)
    wanted = [AdapterFile(str(a["path"]), float(a.get("strength", 1.0))) for a in adapters]
    for file in wanted:
        check_file(file.path, source.hash())
    entries = [{"path": control}] if isinstance(control, str | Path) else control
    controls = [read_control_image(entry, f"control[{i}]", control_image) for i, entry in enumerate(entries)]
    settings = sampling or Sampling(guidance=source.guidance)
    maps = tuple(one.map(settings.size(source.facts.side)) for one in controls)
    for one in controls:
        check_controlnet(one.path, source, one.preprocess)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded_backbone = source.load().to(place)
    loaded_backbone.prepare_for_device(place)
    loaded = load_adapters(loaded_backbone, wanted)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    requests = [Request(text, seed, maps) for text in prompts for seed in seeds]
    warn_of_cut_prompts(loaded_backbone, prompts)
    nets = load_controlnets(loaded_backbone, source, [one.path for one in controls])
    with (
        controlnets_applied(loaded_backbone, nets, [one.strength for one in controls]),
        adapters_applied(loaded_backbone, loaded, [file.strength for file in wanted]),
    ):
        return [Image.fromarray(p) for p in generate(loaded_backbone, requests, settings)]
