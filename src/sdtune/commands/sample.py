"""``sdtune sample``: PNG files with their settings inside, and a grid."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from omegaconf import DictConfig

from sdtune.commands.threads import chosen_threads
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import plain
from sdtune.errors import UserError
from sdtune.hardware.devices import device as device_of
from sdtune.hardware.precision import autocast
from sdtune.hardware.precision import precision as precision_of
from sdtune.images.grids import grid, save_png
from sdtune.loaders import controlnet as controlnets
from sdtune.loaders import lora as files
from sdtune.loaders.controlnet import ControlImage
from sdtune.sampling import prompts
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.prompts import warn_of_cut_prompts

log = logging.getLogger("sdtune")

_COLUMNS = 6


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Everything that can be refused before weights are loaded."""
    container = plain(config)
    trust = container["trust"]
    check_node(container["backbone"], "backbone", trust)
    check_node(container["sampling"], "sampling", trust)
    hardware.check_hardware(container["hardware"])
    check_value(container["seeds"], list[int], "seeds")
    check_value(container["strengths"], list[float] | None, "strengths")
    source = build(container["backbone"], trust)
    source.check()
    if not isinstance(container["adapters"], list):
        raise UserError(
            f"{container['adapters']} is no list", key="adapters", remedy="write adapters=[{path: FILE, strength: 0.8}]"
        )
    for index, adapter in enumerate(container["adapters"]):
        if not isinstance(adapter, dict):
            raise UserError(
                f"{adapter} stands alone", key=f"adapters[{index}]", remedy=f"write {{path: {adapter}, strength: 0.8}}"
            )
        unknown = set(adapter) - {"path", "strength"}
        if "path" not in adapter or unknown:
            odd = f"{sorted(unknown)[0]} is not known" if unknown else "path is missing"
            raise UserError(odd, key=f"adapters[{index}]", remedy="write {path: FILE, strength: 0.8}")
        check_value(adapter.get("strength", 1.0), float, f"adapters[{index}].strength")
        files.check_file(str(adapter["path"]), source.hash(), f"adapters[{index}].path")
    for one in _controls(container):
        one.read_image()
        controlnets.check_controlnet(one.path, source, one.preprocess)
    for _, settings in _wanted(container):
        settings.check(source.facts.factor)

    def start(composed: DictConfig) -> None:
        with chosen_threads(container["hardware"]):
            execute(container, folder)

    return start


def _controls(config: dict[str, Any]) -> list[ControlImage]:
    check_value(config["control"], list[dict[str, Any]], "control")
    return [controlnets.read_control_image(entry, f"control[{i}]") for i, entry in enumerate(config["control"])]


def _wanted(config: dict[str, Any]) -> list[tuple[Request, Sampling]]:
    """What to draw: prompts x seeds, or the lines of a file with their own settings."""
    settings: Sampling = build(config["sampling"], config["trust"])
    if config["prompts_file"]:
        wanted = []
        hints = get_type_hints(Sampling, include_extras=True)
        for line in prompts.read_prompt_file(config["prompts_file"]):
            own: dict[str, Any] = {
                "negative_prompt": line.negative,
                "width": line.width,
                "height": line.height,
                "guidance": line.guidance,
                "steps": line.steps,
            }
            said = {key: value for key, value in own.items() if value is not None}
            for key, value in said.items():
                check_value(value, hints[key], f"prompts_file: {line.prompt!r}, {key}")
            changed = replace(settings, **said)
            seeds = [line.seed] if line.seed is not None else config["seeds"]
            wanted += [(Request(line.prompt, seed), changed) for seed in seeds]
        return wanted
    if not config["prompt"]:
        raise UserError("prompt is missing: give prompt='a photo of ...' or prompts_file=FILE")
    texts = config["prompt"] if isinstance(config["prompt"], list) else [config["prompt"]]
    return [(Request(str(text), seed), settings) for text in texts for seed in config["seeds"]]


def execute(config: dict[str, Any], folder: Path) -> None:
    """Draw and write."""
    source = build(config["backbone"], config["trust"])
    device = device_of(str(config["hardware"]["accelerator"]))
    backbone = source.load().to(device)
    backbone.prepare_for_device(device)
    if config["hardware"].get("vae_tiling"):
        backbone.decode_in_tiles()
    wanted = [files.AdapterFile(str(a["path"]), float(a.get("strength", 1.0))) for a in config["adapters"]]
    loaded = files.load_adapters(backbone, wanted)
    controls = _controls(config)
    nets = controlnets.load_controlnets(backbone, source, [one.path for one in controls])
    requests = _wanted(config)
    warn_of_cut_prompts(backbone, [request.prompt for request, _ in requests])
    sizes = {settings.size(source.facts.side) for _, settings in requests}
    maps = {size: tuple(one.map(size) for one in controls) for size in sizes}
    requests = [(replace(r, maps=maps[settings.size(source.facts.side)]), settings) for r, settings in requests]
    factors = config["strengths"] or [1.0]
    rows: list[list[np.ndarray]] = []
    precision = precision_of(config["hardware"]["precision"], device.type)
    for factor in factors:
        with (
            autocast(device, precision),
            controlnets.controlnets_applied(backbone, nets, [one.strength * factor for one in controls]),
            files.adapters_applied(backbone, loaded, [file.strength * factor for file in wanted]),
        ):
            row: list[np.ndarray] = []
            for settings, same in groupby(requests, key=lambda wanted: wanted[1]):
                row += generate(backbone, [request for request, _ in same], settings)
        rows.append(row)
    _write(folder, config, requests, controls, factors, rows)


def describe(
    settings: Any,
    prompt: str,
    seed: int,
    adapters: Sequence[dict[str, Any]],
    strength: float,
    control: Sequence[ControlImage] = (),
) -> dict[str, str]:
    """An image's metadata: A1111's ``parameters`` line, and everything as JSON."""
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


def _write(
    folder: Path,
    config: dict[str, Any],
    requests: list[tuple[Request, Sampling]],
    controls: list[ControlImage],
    factors: list[float],
    rows: list[list[np.ndarray]],
) -> None:
    for factor, row in zip(factors, rows, strict=True):
        for number, ((request, settings), image) in enumerate(zip(requests, row, strict=True)):
            mark = f"_strength{factor:g}" if len(factors) > 1 else ""
            metadata = describe(settings, request.prompt, request.seed, config["adapters"], factor, controls)
            save_png(image, folder / f"{number:03d}_seed{request.seed}{mark}.png", metadata)
    if len({image.shape for row in rows for image in row}) == 1:
        prompts_shown = [request.prompt for request, _ in requests]
        if len(factors) > 1:
            seeded = [f"{request.prompt}, seed {request.seed}" for request, _ in requests]
            columns = seeded if len(config["seeds"]) > 1 else prompts_shown
            sheet = grid(rows, [f"strength x {factor:g}" for factor in factors], columns)
        elif len(config["seeds"]) > 1 and not config["prompts_file"]:
            seeds = len(config["seeds"])
            shown = [rows[0][i : i + seeds] for i in range(0, len(rows[0]), seeds)]
            sheet = grid(shown, prompts_shown[::seeds], [f"seed {seed}" for seed in config["seeds"]])
        else:
            shown = [rows[0][i : i + _COLUMNS] for i in range(0, len(rows[0]), _COLUMNS)]
            sheet = grid(shown, column_labels=prompts_shown if len(shown) == 1 else ())
        save_png(sheet, folder / "grid.png")
        log.info("grid: %s", folder / "grid.png")
    log.info("%d images: %s", len(requests) * len(factors), folder)
