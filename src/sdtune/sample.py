"""``sdtune sample``, and :func:`sample` in Python: pictures, with adapters and control at strengths chosen now."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdtune.launch import main, quietly

if TYPE_CHECKING:
    from PIL import Image

    from sdtune.backbone import Pretrained
    from sdtune.controlnets import ControlImage
    from sdtune.sampling import Sampling

log = logging.getLogger("sdtune")


class _Callable(ModuleType):
    """Importing this module puts it where ``sdtune.sample`` the function is looked for; calling it is the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return sample(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


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
    """Pictures of each prompt with each seed, prompts outermost.

    Args:
        prompt: one or more.
        adapters: ``{"path": FILE, "strength": 0.8}`` each; a run's ``artifact`` folder is a path too.
        control: the folder of a ControlNet, or ``{"path": NET, "image": FILE, "strength": 1.0, "preprocess": "canny"}``
            for each of several (:class:`sdtune.controlnets.ControlImage`); their residuals add up.
        control_image: a picture or its file, for each net that names no image of its own.
        backbone: pocket if None.
        seeds: one picture a prompt and seed.
        sampling: steps, guidance, size, solver; the backbone's guidance if None.
        device: as in torch; an accelerator if there is one.

    Raises:
        ValueError: for an adapter or a ControlNet that is missing, damaged, or does not fit the backbone.
    """
    import torch
    from PIL import Image

    from sdtune import adapters as files
    from sdtune import controlnets
    from sdtune.backbone import Pretrained
    from sdtune.sampling import Request, Sampling, generate

    source = backbone or Pretrained(guidance=3.0)
    wanted = [files.AdapterFile(str(a["path"]), float(a.get("strength", 1.0))) for a in adapters]
    for file in wanted:
        files.check_file(file.path, source.hash())
    entries = [{"path": control}] if isinstance(control, str | Path) else control
    controls = [controlnets.read(entry, f"control[{i}]", control_image) for i, entry in enumerate(entries)]
    settings = sampling or Sampling(guidance=source.guidance)
    maps = tuple(one.map(settings.size(source.facts.side)) for one in controls)
    for one in controls:
        controlnets.check(one.path, source, one.preprocess)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded_backbone = source.load().to(place)
    loaded_backbone.suit(place)
    loaded = files.load(loaded_backbone, wanted)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    requests = [Request(text, seed, maps) for text in prompts for seed in seeds]
    nets = controlnets.load(loaded_backbone, source, [one.path for one in controls])
    with (
        controlnets.applied(loaded_backbone, nets, [one.strength for one in controls]),
        files.applied(loaded_backbone, loaded, [file.strength for file in wanted]),
    ):
        return [Image.fromarray(p) for p in generate(loaded_backbone, requests, settings)]


prepare = quietly("sdtune.sample_run")


def describe(
    settings: Any,
    prompt: str,
    seed: int,
    adapters: Sequence[dict[str, Any]],
    strength: float,
    control: Sequence[ControlImage] = (),
) -> dict[str, str]:
    """A picture's metadata: A1111's ``parameters`` line, and everything as JSON."""
    line = (
        f"{prompt}\nNegative prompt: {settings.negative_prompt}\nSteps: {settings.steps}, Sampler:"
        f" {settings.sampler or 'default'}, CFG scale: {settings.guidance}, Seed: {seed}"
    )
    facts = {
        "prompt": prompt,
        "seed": seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "negative_prompt": settings.negative_prompt,
        "sampler": settings.sampler,
        "adapters": [{"path": Path(a["path"]).name, "strength": a.get("strength", 1.0) * strength} for a in adapters],
    }
    if control:
        facts["control"] = [
            {
                "path": Path(one.path).name,
                "image": Path(str(one.image)).name,
                "strength": one.strength * strength,
                "preprocess": one.preprocess,
            }
            for one in control
        ]
    return {"parameters": line, "sdtune": json.dumps(facts)}


if __name__ == "__main__":
    main("sample", prepare)
