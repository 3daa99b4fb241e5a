"""The measuring classifier: what a picture of the world shows. ``python -m sdtune.pocket.classifier FOLDER [STEPS]``.

A small residual CNN names the object, its size and its style; the background is read exactly from the border. It only
measures: it never trains another network, and never chooses a checkpoint, a setting or a picture.

It learns from true renders of all things, the held-out subjects too, in both styles and in every combination. A quarter
of them went through FOLDER's VAE and keep their labels, so that the ceiling on reconstructions is a fair one. A mild
blur keeps the labels as well. A strong blur, and an even mix of two things, are the extra class :data:`NOTHING`, so
that a smear is not counted as the object that it resembles most; they say nothing about size and style.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtune.pocket.objects import BACKGROUNDS, HELD_OUT, PLACES, SIZES, STYLES, THINGS
from sdtune.pocket.pretrain import Pretraining, pretrain
from sdtune.pocket.vae import SEED
from sdtune.pocket.world import SIDE, Scene, compose, draw
from sdtune.randomness import generator

NOTHING = "nothing"
"""The object's name where none is recognisable."""

PICTURES = 30_000
STEPS = 1_500
BATCH = 128

_OBJECTS = (*(thing.name for thing in THINGS), NOTHING)
_WIDTHS = (32, 64, 128, 128)
_BORDER = 2
_CHUNK = 64
_ROUND_TRIP_EVERY = 4
_STRONG_BLUR, _MIX, _MILD_BLUR = 0.1, 0.1, 0.2  # shares of a batch
# Gaussian sigmas as shares of the object's box: mild leaves details, strong at most four blobs across, at the far end
# an empty background. Between the two nobody could say, so nothing is drawn there.
_MILD_SIGMA = (0.0, 0.025)
_STRONG_SIGMA = (0.1, 0.5)
_UNKNOWN = -100  # cross_entropy's ignore_index


class Readings(NamedTuple):
    """What N pictures show; each probability (float32 [N]) is that of the name given."""

    object: list[str]
    size: list[str]
    style: list[str]
    object_probability: np.ndarray
    size_probability: np.ndarray
    style_probability: np.ndarray


class _Block(nn.Module):
    """A residual block (He et al. 2016, "Deep residual learning for image recognition", figure 2)."""

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
    """Pictures to the logits of three heads; ``objects``, ``sizes`` and ``styles`` name their outputs."""

    def __init__(
        self,
        objects: tuple[str, ...] = _OBJECTS,
        sizes: tuple[str, ...] = tuple(SIZES),
        styles: tuple[str, ...] = STYLES,
    ) -> None:
        super().__init__()
        self.names = (objects, sizes, styles)
        first = _WIDTHS[0]
        blocks = [_Block(first, first, 1), *(_Block(a, b, 2) for a, b in pairwise(_WIDTHS))]
        stem = (nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.trunk = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(_WIDTHS[-1], len(names)) for names in self.names)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, names] of object, size and style for ``pictures``: uint8 [N, 64, 64, 3]."""
        features = self.trunk(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return tuple(head(features) for head in self.heads)

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> Readings:
        """What ``pictures`` (uint8 [N, 64, 64, 3]) show, in fp32; leaves the classifier in evaluation mode.

        Raises:
            ValueError: another shape or type, or no picture.
        """
        _check(pictures)
        self.eval()
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            chunks = [
                self(torch.from_numpy(np.array(pictures[k : k + _CHUNK])).to(device))
                for k in range(0, len(pictures), _CHUNK)
            ]
        names: list[list[str]] = []
        probabilities: list[np.ndarray] = []
        for head, words in zip(zip(*chunks, strict=True), self.names, strict=True):
            best = torch.cat(head).softmax(1).max(1)
            names.append([words[k] for k in best.indices.tolist()])
            probabilities.append(best.values.cpu().numpy())
        return Readings(names[0], names[1], names[2], *probabilities)


def _check(pictures: np.ndarray) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (SIDE, SIDE, 3) or not len(pictures):
        raise ValueError(f"pictures: {pictures.dtype} {list(pictures.shape)}, not uint8 [N, {SIDE}, {SIDE}, 3], N >= 1")


def background(pictures: np.ndarray) -> list[str]:
    """The background's colour word: nearest in RGB to the median colour of the two outermost pixels on each side.

    An object may reach the border on one side, but never covers half of it, so on true renders this is exact.

    Args:
        pictures: uint8 [N, 64, 64, 3].

    Raises:
        ValueError: another shape or type, or no picture.
    """
    colours = border_colours(pictures)
    distances = np.linalg.norm(colours[:, None] - np.array(list(BACKGROUNDS.values())), axis=-1)
    return [list(BACKGROUNDS)[int(k)] for k in distances.argmin(1)]


def border_colours(pictures: np.ndarray) -> np.ndarray:
    """Median colour of the two outermost pixels on each side: float [N, 3] from uint8 [N, 64, 64, 3]."""
    _check(pictures)
    border = np.ones((SIDE, SIDE), dtype=bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    colours: np.ndarray = np.median(pictures[:, border], axis=1)
    return colours


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """``pictures`` (uint8 [N, 64, 64, 3]) through the VAE and back, by the mean latents, rounded to 8 bits."""
    out = np.empty(pictures.shape, dtype=np.uint8)
    for k in range(0, len(pictures), _CHUNK):
        pixels = torch.from_numpy(np.array(pictures[k : k + _CHUNK])).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        levels = ((decoded + 1) * 127.5).round().clamp(0, 255)
        out[k : k + _CHUNK] = levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return out


def pool_scene(index: int) -> Scene:
    """Scene ``index`` of the classifier's training pictures: any thing in any combination and style."""
    rng = generator(SEED, "classifier/scene", index)
    thing, colour, size, where, style = (
        options[int(rng.integers(len(options)))]
        for options in (_OBJECTS[:-1], list(BACKGROUNDS), list(SIZES), list(PLACES), STYLES)
    )
    return compose(thing, colour, size, where, rng, style)


def pool_pictures(folder: Path, vae: AutoencoderKL, count: int) -> np.ndarray:
    """Pictures of the scenes 0..count-1, every fourth through ``vae``: uint8 [count, 64, 64, 3], memory-mapped.

    The file in ``folder`` is named by the VAE's weights, so that another VAE gets another pool.
    """
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in vae.state_dict().values()))
    path = folder / f"pool-{SEED}-{count}-{weights.hexdigest()[:12]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pool = np.stack([np.asarray(draw(pool_scene(index))) for index in range(count)])
        pool[::_ROUND_TRIP_EVERY] = reconstruct(vae, pool[::_ROUND_TRIP_EVERY])
        partial = path.with_suffix(".partial")
        with partial.open("wb") as handle:
            np.save(handle, pool)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    pictures: np.ndarray = np.load(path, mmap_mode="r")
    return pictures


def _blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


class PoolBatches:
    """Pictures of the pool, some spoilt, with the truth: ``pictures`` and ``truth`` (object, size, style) [B, 3]."""

    def __init__(self, pool: np.ndarray) -> None:
        self.pool = pool
        scenes = [pool_scene(index) for index in range(len(pool))]
        words = (_OBJECTS, tuple(SIZES), STYLES)
        self.truth = np.array(
            [[w.index(x) for w, x in zip(words, (s.thing, s.size, s.style), strict=True)] for s in scenes]
        )
        self.backgrounds = np.array([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        self.sides = np.array([scene.side for scene in scenes])

    def __call__(self, step: int) -> dict[str, Any]:
        rng = generator(SEED, "classifier/batch", step)
        indices = rng.integers(len(self.pool), size=BATCH)
        pictures, truth = self.pool[indices], self.truth[indices]
        for k, index in enumerate(indices):
            fate = rng.random()
            if fate < _STRONG_BLUR + _MIX:
                strong = fate < _STRONG_BLUR
                pictures[k] = self._smear(int(index), _STRONG_SIGMA, rng) if strong else self._mix(int(index), rng)
                truth[k] = (_OBJECTS.index(NOTHING), _UNKNOWN, _UNKNOWN)
            elif fate < _STRONG_BLUR + _MIX + _MILD_BLUR:
                pictures[k] = self._smear(int(index), _MILD_SIGMA, rng)
        return {"pictures": torch.from_numpy(pictures), "truth": torch.from_numpy(truth)}

    def _smear(self, index: int, sigma: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
        return _blurred(self.pool[index], float(rng.uniform(*sigma)) * int(self.sides[index]))

    def _mix(self, index: int, rng: np.random.Generator) -> np.ndarray:
        # Of one background: a mix of two would be known by a colour that no true picture has, not by its object.
        others = (self.backgrounds == self.backgrounds[index]) & (self.truth[:, 0] != self.truth[index, 0])
        other = self.pool[rng.choice(np.flatnonzero(others))]
        share = rng.uniform(0.4, 0.6)
        mixed: np.ndarray = (share * self.pool[index] + (1 - share) * other).round().astype(np.uint8)
        return mixed


class ClassifierTraining(Pretraining):
    def __init__(self, steps: int = STEPS, lr: float = 2e-3) -> None:
        super().__init__(lr, steps, weight_decay=0.05)
        self.classifier = Classifier()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self.classifier(batch["pictures"])
        loss = sum(
            (
                F.cross_entropy(head.float(), batch["truth"][:, k], ignore_index=_UNKNOWN)
                for k, head in enumerate(logits)
            ),
            start=torch.zeros((), device=logits[0].device),
        )
        return {"loss": loss, "object": (logits[0].argmax(1) == batch["truth"][:, 0]).float().mean().detach()}


def train(folder: Path, vae: AutoencoderKL, steps: int = STEPS, pictures: int = PICTURES) -> Classifier:
    """Train on ``pictures`` pictures for ``steps`` steps; pool and checkpoint stay in ``folder``, to go on from."""
    batches = PoolBatches(pool_pictures(folder, vae, pictures))
    torch.manual_seed(SEED)
    module = ClassifierTraining(steps)
    pretrain(module, batches, folder)
    return module.classifier.eval()


def save(classifier: Classifier, folder: Path) -> None:
    """Write ``classifier.safetensors`` (fp16) and ``config.json`` (the names of each head's outputs)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_file(tensors, folder / "classifier.safetensors")
    objects, sizes, styles = classifier.names
    (folder / "config.json").write_text(json.dumps({"objects": objects, "sizes": sizes, "styles": styles}, indent=1))


def load(folder: Path | None = None) -> Classifier:
    """The shipped classifier, or the one that :func:`save` wrote to ``folder``: fp32, on the CPU, ready to read.

    Raises:
        ValueError: one of its two files is missing.
    """
    root: Traversable = folder or files("sdtune.pocket") / "models" / "classifier"
    config, weights = root / "config.json", root / "classifier.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; `python -m sdtune.pocket.classifier FOLDER` trains a classifier")
    classifier = Classifier(**{key: tuple(names) for key, names in json.loads(config.read_text()).items()})
    classifier.load_state_dict(tensors_from_bytes(weights.read_bytes()))
    return classifier.eval()


def ceilings(classifier: Classifier, vae: AutoencoderKL, seed: int) -> dict[str, float]:
    """How often the classifier names a held-out subject rightly: the most that any generated picture can score.

    Returns:
        ``classifier_accuracy`` on fresh true renders, over all backgrounds, sizes and places, and
        ``classifier_accuracy_vae`` on the reconstructions of the big ones, since the VAE smears small faces.
    """
    rng = generator(seed, "classifier/ceilings")
    scenes = [
        compose(thing.name, colour, size, where, rng)
        for thing in HELD_OUT
        for colour in BACKGROUNDS
        for size in SIZES
        for where in PLACES
    ]
    pictures = np.stack([np.asarray(draw(scene)) for scene in scenes])
    names = np.array([scene.thing for scene in scenes])
    big = np.array([scene.size == "big" for scene in scenes])
    rebuilt = classifier.read(reconstruct(vae, pictures[big]))
    return {
        "classifier_accuracy": float(np.mean(np.array(classifier.read(pictures).object) == names)),
        "classifier_accuracy_vae": float(np.mean(np.array(rebuilt.object) == names[big])),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval()
    save(train(folder / "classifier-training", vae, steps), folder / "classifier")
    # Of what was written, so that the rounding to fp16 is measured too.
    print(ceilings(load(folder / "classifier"), vae, SEED))


if __name__ == "__main__":
    main()
