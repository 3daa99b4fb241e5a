"""``sdtune sample``: generate PNG files with their settings as metadata, and a grid."""

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

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.commands.sample_run import with_run
from sdtune.commands.threads import choose_threads
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import plain
from sdtune.errors import UserError
from sdtune.hardware.precision import autocast, generation_dtype
from sdtune.images.grids import grid, save_png
from sdtune.loaders.artifact import ArtifactFile, LoadedArtifact, artifacts_applied
from sdtune.loaders.controlnet import ControlImage, read_control_images
from sdtune.loaders.lora import AdapterFile
from sdtune.loaders.words import LoadedWords, check_distinct
from sdtune.progress import bar
from sdtune.runs.hydra_values import current_overrides
from sdtune.sampling import prompts
from sdtune.sampling.load import load_to_generate
from sdtune.sampling.loop import Request, Sampling, Seed, generate
from sdtune.sampling.prompts import (
    warn_about_options,
    warn_about_other_syntax,
    warn_about_truncated_prompts,
    warn_about_unused_words,
)

log = logging.getLogger("sdtune")

_COLUMNS = 6


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` without loading weights, and return the function that generates the images."""
    if config.run is not None:
        config = with_run(config, current_overrides())
    container = plain(config, ("backbone", "hardware", "sampling"))
    trust = container["trust"]
    check_node(container["backbone"], "backbone", trust)
    check_node(container["sampling"], "sampling", trust)
    hardware.check_hardware(container["hardware"])
    check_value(container["seeds"], list[Seed], "seeds")
    if not container["seeds"]:
        raise UserError("no seed", key="seeds", remedy="set one seed for each image of a prompt, such as seeds=0-3")
    check_value(container["strengths"], list[float] | None, "strengths")
    source: Pretrained = build(container["backbone"], trust)
    source.check()
    _check_adapters(container["adapters"])
    for key, files in _artifact_files(container).items():
        for number, file in enumerate(files):
            file.check(source, f"{key}[{number}].path")
    build(container["sampling"], trust).check(source.facts)
    for _, settings in _requests(container):
        settings.check(source.facts, "prompts_file")

    def start(composed: DictConfig) -> None:
        with choose_threads(container["hardware"]):
            execute(container, folder)

    return start


def _check_adapters(adapters: Any) -> None:
    """Check the setting ``adapters``."""
    if not isinstance(adapters, list):
        raise UserError(
            f"expected a list, got {adapters}",
            key="adapters",
            remedy=f"use 'adapters=[{{path: {adapters}, strength: 0.8}}]'",
        )
    for index, adapter in enumerate(adapters):
        if not isinstance(adapter, dict):
            raise UserError(
                f"expected a mapping, got {adapter}",
                key=f"adapters[{index}]",
                remedy=f"use 'adapters=[{{path: {adapter}, strength: 0.8}}]'",
            )
        unknown_keys = set(adapter) - {"path", "strength"}
        if "path" not in adapter or unknown_keys:
            message = f"unknown key {sorted(unknown_keys)[0]}" if unknown_keys else "path is missing"
            raise UserError(message, key=f"adapters[{index}]", remedy="use {path: FILE, strength: 0.8}")
        check_value(adapter.get("strength", 1.0), float, f"adapters[{index}].strength")


def _artifact_files(config: dict[str, Any]) -> dict[str, Sequence[ArtifactFile]]:
    """The files of the settings ``adapters`` and ``control``, by setting."""
    return {"adapters": _adapters(config), "control": _controls(config)}


def _adapters(config: dict[str, Any]) -> list[AdapterFile]:
    return [AdapterFile(str(a["path"]), float(a.get("strength", 1.0))) for a in config["adapters"]]


def _controls(config: dict[str, Any]) -> list[ControlImage]:
    check_value(config["control"], list[dict[str, Any]], "control")
    return read_control_images(config["control"])


def _requests(config: dict[str, Any]) -> list[tuple[Request, Sampling]]:
    """The images to generate, with their settings: each prompt with each seed, or the lines of a prompt file."""
    settings: Sampling = build(config["sampling"], config["trust"])
    if config["prompts_file"]:
        requests = []
        hints = get_type_hints(Sampling, include_extras=True)
        for line in prompts.read_prompt_file(config["prompts_file"]):
            options: dict[str, Any] = {
                "negative_prompt": line.negative,
                "width": line.width,
                "height": line.height,
                "guidance": line.guidance,
                "steps": line.steps,
            }
            overrides = {key: value for key, value in options.items() if value is not None}
            for key, value in overrides.items():
                check_value(value, hints[key], f"prompts_file: {line.prompt!r}, {key}")
            check_value(line.seed, Seed | None, f"prompts_file: {line.prompt!r}, seed")
            line_settings = replace(settings, **overrides)
            seeds = [line.seed] if line.seed is not None else config["seeds"]
            requests += [(Request(line.prompt, seed), line_settings) for seed in seeds]
        return requests
    if not config["prompt"]:
        raise UserError("missing value", key="prompt", remedy="set prompt='a photo of ...' or prompts_file=FILE")
    texts = config["prompt"] if isinstance(config["prompt"], list) else [config["prompt"]]
    return [(Request(str(text), seed), settings) for text in texts for seed in config["seeds"]]


def execute(config: dict[str, Any], folder: Path) -> None:
    """Generate the images, and write them and their grid to ``folder``."""
    source = build(config["backbone"], config["trust"])
    device = hardware.first_device(config["hardware"])
    precision = str(config["hardware"]["precision"])
    dtype = generation_dtype(device, precision)
    tiling = bool(config["hardware"].get("vae_tiling"))
    # On a CPU, bf16-mixed keeps float32 weights and uses autocast.
    on_cpu = device.type == "cpu"
    backbone = load_to_generate(source, device, None if on_cpu else dtype, vae_tiling=tiling)
    # A LoRA is merged into the denoiser of a ControlNet, if the ControlNet has one.
    files: list[ArtifactFile] = [*_controls(config), *_adapters(config)]
    artifacts = [artifact for file in files for artifact in file.load(backbone, source)]
    check_distinct(artifacts)
    requests = _requests(config)
    _warn_about_prompts(backbone, artifacts, requests)
    sizes = {settings.size(source.facts.side) for _, settings in requests}
    conditions = {
        size: {name: value for file in files for name, value in file.conditions(size).items()} for size in sizes
    }
    requests = [
        (replace(request, conditions=conditions[settings.size(source.facts.side)]), settings)
        for request, settings in requests
    ]
    factors = config["strengths"] or [1.0]
    rows: list[list[np.ndarray]] = []
    with bar("Generating images", len(factors) * len(requests)) as progress:
        for factor in factors:
            with (
                autocast(device, precision if on_cpu else "32-true"),
                artifacts_applied(backbone, artifacts, factor),
            ):
                rows.append([])
                for settings, group in groupby(requests, key=lambda pair: pair[1]):
                    for image in generate(backbone, [request for request, _ in group], settings):
                        rows[-1].append(image)
                        progress(1)
    _write(folder, config, requests, _controls(config), factors, rows)


def _warn_about_prompts(
    backbone: Backbone, artifacts: Sequence[LoadedArtifact], requests: Sequence[tuple[Request, Sampling]]
) -> None:
    texts = [text for request, settings in requests for text in (request.prompt, settings.negative_prompt)]
    words = [artifact for artifact in artifacts if isinstance(artifact, LoadedWords)]
    with artifacts_applied(backbone, words):
        warn_about_truncated_prompts(backbone, texts)
    warn_about_other_syntax(texts)
    warn_about_options(texts)
    warn_about_unused_words([word for artifact in words for word in artifact.vectors], texts)


def describe(
    settings: Any,
    prompt: str,
    seed: int,
    adapters: Sequence[dict[str, Any]],
    strength: float,
    control: Sequence[ControlImage] = (),
) -> dict[str, str]:
    """Metadata of an image: ``parameters`` in the format of A1111, and ``sdtune`` with all settings as JSON.

    Args:
        strength: factor on the strengths of ``adapters`` and ``control``.
    """
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
    if settings.skip_guidance_layers:
        facts |= {name: getattr(settings, name) for name in ("skip_guidance_layers", "skip_layer_guidance_scale")}
    if control:
        facts["control"] = [
            {
                "path": Path(net.path).name,
                "image": Path(str(net.image)).name,
                "strength": net.strength * strength,
                "preprocess": net.preprocess,
            }
            for net in control
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
            suffix = f"_strength{factor:g}" if len(factors) > 1 else ""
            metadata = describe(settings, request.prompt, request.seed, config["adapters"], factor, controls)
            save_png(image, folder / f"{number:03d}_seed{request.seed}{suffix}.png", metadata)
    if len({image.shape for row in rows for image in row}) == 1:
        prompt_labels = [request.prompt for request, _ in requests]
        if len(factors) > 1:
            prompts_and_seeds = [f"{request.prompt}, seed {request.seed}" for request, _ in requests]
            columns = prompts_and_seeds if len(config["seeds"]) > 1 else prompt_labels
            sheet = grid(rows, [f"strength x {factor:g}" for factor in factors], columns)
        elif len(config["seeds"]) > 1 and not config["prompts_file"]:
            seeds = len(config["seeds"])
            grid_rows = [rows[0][i : i + seeds] for i in range(0, len(rows[0]), seeds)]
            sheet = grid(grid_rows, prompt_labels[::seeds], [f"seed {seed}" for seed in config["seeds"]])
        else:
            grid_rows = [rows[0][i : i + _COLUMNS] for i in range(0, len(rows[0]), _COLUMNS)]
            sheet = grid(grid_rows, column_labels=prompt_labels if len(grid_rows) == 1 else ())
        save_png(sheet, folder / "grid.png")
        log.info("grid: %s", folder / "grid.png")
    count = len(requests) * len(factors)
    log.info("%d image%s: %s", count, "" if count == 1 else "s", folder)
