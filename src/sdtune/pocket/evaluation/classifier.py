"""Classifier of object, size, style and background in images of pocket's world.

A small residual CNN predicts the object, its size and its style; the background color is computed from the border. It
is used only to measure: never to train another network, or to select a checkpoint, a setting or an image. It is trained
by :mod:`sdtune.pocket.pretraining.classifier`.
"""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn

from sdtune import streams
from sdtune.errors import UserError
from sdtune.pocket.world.objects import BACKGROUNDS, HELD_OUT, PLACES, SIZES, STYLES, THINGS
from sdtune.pocket.world.scenes import SIDE, compose_scene, draw_scene
from sdtune.randomness import generator

NOTHING = "nothing"
"""Object label of images without a recognizable object."""

OBJECTS = (*(thing.name for thing in THINGS), NOTHING)
"""Output labels of the object head."""

_WIDTHS = (32, 64, 128, 128)
_BORDER = 2
_CHUNK = 64


class Predictions(NamedTuple):
    """Predicted labels of N images, and the probability (float32 [N]) of each predicted label."""

    object: list[str]
    size: list[str]
    style: list[str]
    object_probability: np.ndarray
    size_probability: np.ndarray
    style_probability: np.ndarray


class _Block(nn.Module):
    """Residual block (He et al. 2016, "Deep residual learning for image recognition", figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Classifier(nn.Module):
    """Residual CNN with three heads; ``objects``, ``sizes`` and ``styles`` are the output labels of each head."""

    def __init__(
        self,
        objects: tuple[str, ...] = OBJECTS,
        sizes: tuple[str, ...] = tuple(SIZES),
        styles: tuple[str, ...] = STYLES,
    ) -> None:
        super().__init__()
        self.names = (objects, sizes, styles)
        stem_width = _WIDTHS[0]
        blocks = [_Block(stem_width, stem_width, 1), *(_Block(a, b, 2) for a, b in pairwise(_WIDTHS))]
        stem = (nn.Conv2d(3, stem_width, 3, 2, 1, bias=False), nn.BatchNorm2d(stem_width), nn.ReLU())
        self.trunk = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(_WIDTHS[-1], len(labels)) for labels in self.names)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, labels] of object, size and style for ``images`` (uint8 [N, 64, 64, 3])."""
        features = self.trunk(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return tuple(head(features) for head in self.heads)

    @torch.no_grad()
    def read(self, images: np.ndarray) -> Predictions:
        """Predict the labels of ``images`` (uint8 [N, 64, 64, 3]) in float32; switches to evaluation mode.

        Raises:
            UserError: wrong shape or dtype, or no image.
        """
        _check(images)
        self.eval()
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            chunks = [
                self(torch.from_numpy(np.array(images[k : k + _CHUNK])).to(device))
                for k in range(0, len(images), _CHUNK)
            ]
        predictions: list[list[str]] = []
        probabilities: list[np.ndarray] = []
        for logits, labels in zip(zip(*chunks, strict=True), self.names, strict=True):
            best = torch.cat(logits).softmax(1).max(1)
            predictions.append([labels[k] for k in best.indices.tolist()])
            probabilities.append(best.values.cpu().numpy())
        return Predictions(predictions[0], predictions[1], predictions[2], *probabilities)


def _check(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3) or not len(images):
        raise UserError(
            f"expected uint8 [N, {SIDE}, {SIDE}, 3] with N >= 1, got {images.dtype} {list(images.shape)}", key="images"
        )


def background(images: np.ndarray) -> list[str]:
    """Background color names: the nearest in RGB to the median color of the two outermost pixels on each side.

    Exact on true renders: an object can reach the border on one side but never covers half of it.

    Args:
        images: uint8 [N, 64, 64, 3].

    Raises:
        UserError: wrong shape or dtype, or no image.
    """
    colours = border_colours(images)
    distances = np.linalg.norm(colours[:, None] - np.array(list(BACKGROUNDS.values())), axis=-1)
    return [list(BACKGROUNDS)[int(k)] for k in distances.argmin(1)]


def border_colours(images: np.ndarray) -> np.ndarray:
    """Median color of the two outermost pixels on each side: float [N, 3] from uint8 [N, 64, 64, 3]."""
    _check(images)
    border = np.ones((SIDE, SIDE), dtype=bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    colours: np.ndarray = np.median(images[:, border], axis=1)
    return colours


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode ``images`` (uint8 [N, 64, 64, 3]) with the VAE, using the latents' mean; rounded to 8 bits."""
    out = np.empty(images.shape, dtype=np.uint8)
    for k in range(0, len(images), _CHUNK):
        pixels = torch.from_numpy(np.array(images[k : k + _CHUNK])).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        levels = ((decoded + 1) * 127.5).round().clamp(0, 255)
        out[k : k + _CHUNK] = levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return out


def load_classifier(folder: Path | None = None) -> Classifier:
    """Load the shipped classifier, or the one in ``folder``: float32, on the CPU, in evaluation mode.

    Raises:
        UserError: ``config.json`` or ``classifier.safetensors`` is missing.
    """
    root: Traversable = folder or files("sdtune.pocket") / "models" / "classifier"
    config, weights = root / "config.json", root / "classifier.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"{file} is missing",
                remedy="train a classifier with: python -m sdtune.pocket.pretraining.classifier FOLDER",
            )
    classifier = Classifier(
        **{key: tuple(labels) for key, labels in json.loads(config.read_text(encoding="utf-8")).items()}
    )
    classifier.load_state_dict(tensors_from_bytes(weights.read_bytes()))
    return classifier.eval()


def ceilings(classifier: Classifier, vae: AutoencoderKL, seed: int) -> dict[str, float]:
    """Accuracy of the classifier on held-out subjects: the upper limit for generated images.

    Returns:
        ``classifier_accuracy`` on new true renders, over all backgrounds, sizes and places;
        ``classifier_accuracy_vae`` on VAE reconstructions of the big objects only, because the VAE blurs small faces.
    """
    rng = generator(seed, streams.CLASSIFIER_CEILINGS)
    scenes = [
        compose_scene(thing.name, colour, size, where, rng)
        for thing in HELD_OUT
        for colour in BACKGROUNDS
        for size in SIZES
        for where in PLACES
    ]
    images = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    names = np.array([scene.thing for scene in scenes])
    big = np.array([scene.size == "big" for scene in scenes])
    reconstructed = classifier.read(reconstruct(vae, images[big]))
    return {
        "classifier_accuracy": float(np.mean(np.array(classifier.read(images).object) == names)),
        "classifier_accuracy_vae": float(np.mean(np.array(reconstructed.object) == names[big])),
    }
