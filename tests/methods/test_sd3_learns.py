"""Training on Stable Diffusion 3 learns from random weights: colors by name, a new word, and the shapes of maps.

The LoRA and the ControlNet start from the model of the full fine-tuning. Errors in the flow, its sampling or a method
would show in the samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdtune
from families import build_learner
from running import train
from sdtune.backbone import Pretrained
from sdtune.images.grids import grid
from sdtune.sampling.loop import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Images = Mapping[str, list[np.ndarray]]
"""Images by word, one for each seed."""

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (230, 210, 50)}
NEW_WORD, NEW_COLOR = "zzz", (150, 50, 190)
WITH_NEW = {**COLORS, NEW_WORD: NEW_COLOR}
WITH_BLACK = {**COLORS, "black": (0, 0, 0)}
SIDE, MARGIN, SEEDS = 64, 8, range(8)
MAPS = {name: np.zeros((SIDE, SIDE, 3), np.uint8) for name in ("left", "right", "top", "bottom")}
"""Control maps; the half of the name is white."""
MAPS["left"][:, : SIDE // 2] = MAPS["right"][:, SIDE // 2 :] = 255
MAPS["top"][: SIDE // 2] = MAPS["bottom"][SIDE // 2 :] = 255


def caption(word: str) -> str:
    return f"a {word} image"


def save(folder: Path, name: str, pixels: np.ndarray, word: str) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption(word), encoding="utf-8")


def flat(color: tuple[int, int, int]) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), color, np.uint8)


def settings(model: Path, images: Path, run: Path, steps: int) -> list[str]:
    return [
        "backbone=sd35_medium",
        f"backbone.path={model}",
        "backbone.t5_tokens=8",
        "backbone.guidance=1",
        "data=folder",
        f"data.path={images}",
        "data.resolution=64",
        "data.batch_size=16",
        "name=learned",
        "hardware=cpu",
        "hardware.precision=32-true",
        "callbacks.samples=null",
        "evaluation=none",
        f"trainer.max_steps={steps}",
        f"hydra.run.dir={run}",
    ]


def samples(model: Path, words: Iterable[str], **given: Any) -> Images:
    words, backbone = list(words), Pretrained(str(model), guidance=1.0, t5_tokens=8)
    options = Sampling(steps=20, guidance=1.0, batch_size=32)
    prompts = [caption(word) for word in words]
    images = iter(sdtune.sample(prompts, backbone=backbone, seeds=SEEDS, sampling=options, device="cpu", **given))
    return {word: [np.asarray(next(images)) for _ in SEEDS] for word in words}


def nearest(pixels: np.ndarray, colors: Mapping[str, tuple[int, int, int]]) -> tuple[float, str]:
    """The color of ``colors`` that is nearest to the mean of ``pixels`` [H, W, 3], after its distance."""
    mean = pixels.mean((0, 1))
    return min((float(np.linalg.norm(mean - color)), name) for name, color in colors.items())


def color_of(pixels: np.ndarray, colors: Mapping[str, tuple[int, int, int]], tolerance: float) -> str:
    """The nearest color; empty if its distance is above ``tolerance`` or the pixels are not flat."""
    distance, name = nearest(pixels, colors)
    return name if distance <= tolerance and pixels.std((0, 1)).max() <= 15 else ""


def accuracy(images: Images, colors: Mapping[str, tuple[int, int, int]]) -> float:
    """Share of the images that are flat and have the color of their word."""
    return float(np.mean([color_of(one, colors, 30) == word for word, row in images.items() for one in row]))


def obedience(images: Images, half: str) -> float:
    """Share of the images with the color of their word in the white ``half`` of the map, and black in the other."""
    turns = {"left": 0, "top": 1, "right": 2, "bottom": 3}[half]
    hits = []
    for word, row in images.items():
        for image in (np.rot90(one, turns) for one in row):
            halves = image[:, : SIDE // 2 - MARGIN], image[:, SIDE // 2 + MARGIN :]
            found = [color_of(pixels, WITH_BLACK, 60) for pixels in halves]
            hits.append(found == [word, "black"])
    return float(np.mean(hits))


def save_grid(folder: Path, name: str, rows: Images) -> None:
    """For the eyes of a reader."""
    grid(list(rows.values()), list(rows)).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learns")


@pytest.fixture(scope="module")
def untrained(place: Path) -> Path:
    return build_learner(place / "untrained")


@pytest.fixture(scope="module")
def learned(place: Path, untrained: Path) -> Path:
    """The pipeline after full fine-tuning on one image of each color."""
    for word, color in COLORS.items():
        save(place / "colors", word, flat(color), word)
    overrides = settings(untrained, place / "colors", place / "full", 300)
    assert train("method=full", "optimizer.lr=1e-3", *overrides) == 0
    return place / "full" / "artifact" / "learned"


def test_full_fine_tuning_learns_colors_by_name(untrained: Path, learned: Path, tmp_path: Path) -> None:
    before, after = samples(untrained, COLORS), samples(learned, COLORS)
    save_grid(tmp_path, "full", after)
    chance = np.mean([nearest(image, COLORS)[1] == word for word, row in before.items() for image in row])
    assert chance <= 0.4
    assert accuracy(before, COLORS) == 0
    assert accuracy(after, COLORS) >= 0.95


def test_lora_adds_a_color_under_a_new_word(place: Path, learned: Path, tmp_path: Path) -> None:
    """Without images of the old colors among those of the LoRA, it changes these too."""
    for number in range(4):
        save(place / "new", f"{NEW_WORD}{number}", flat(NEW_COLOR), NEW_WORD)
    for word, color in COLORS.items():
        save(place / "new", word, flat(color), word)
    overrides = settings(learned, place / "new", place / "lora", 120)
    before = samples(learned, [NEW_WORD])
    assert train("method=lora", "method.rank=16", "optimizer.lr=3e-3", *overrides) == 0
    adapters = [{"path": str(place / "lora" / "artifact")}]
    after = samples(learned, WITH_NEW, adapters=adapters)
    save_grid(tmp_path, "lora", {"before": before[NEW_WORD], **after})
    assert accuracy(before, WITH_NEW) == 0
    assert accuracy({NEW_WORD: after.pop(NEW_WORD)}, WITH_NEW) >= 0.95
    assert accuracy(after, WITH_NEW) >= 0.9


def test_controlnet_obeys_map_and_prompt(place: Path, learned: Path, tmp_path: Path) -> None:
    (place / "maps").mkdir()
    for half, pixels in MAPS.items():
        for word, color in COLORS.items():
            save(place / "halves", f"{word}_{half}", np.where(pixels, flat(color), 0).astype(np.uint8), word)
            Image.fromarray(pixels).save(place / "maps" / f"{word}_{half}.png")
    overrides = settings(learned, place / "halves", place / "controlnet", 200)
    overrides += ["data/control=paired", f"data.control.path={place / 'maps'}"]
    assert train("method=controlnet", "optimizer.lr=1e-3", *overrides) == 0
    net = place / "controlnet" / "artifact" / "learned"
    without = samples(learned, COLORS)
    drawn = {
        half: samples(learned, COLORS, control=net, control_image=Image.fromarray(pixels))
        for half, pixels in MAPS.items()
    }
    save_grid(tmp_path, "controlnet", {f"{w}, {h}": row for h, rows in drawn.items() for w, row in rows.items()})
    assert {half: obedience(without, half) for half in MAPS} == dict.fromkeys(MAPS, 0.0)
    assert np.mean([obedience(drawn[half], half) for half in MAPS]) >= 0.95
