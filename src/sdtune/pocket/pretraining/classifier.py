"""Training of the evaluation classifier: ``python -m sdtune.pocket.pretraining.classifier FOLDER [STEPS]``.

The training images are true renders of all objects, including the held-out subjects, in both styles and in every
combination. A quarter of them are VAE reconstructions with unchanged labels, so that the accuracy on reconstructions is
a fair ceiling. Mildly blurred images also keep their labels. Strongly blurred images and mixes of two objects get the
extra label :data:`NOTHING`, so that a blurred image is not counted as the most similar object; they have no size and
style label.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor

from sdtune import streams
from sdtune.files import replacing, write_json
from sdtune.formats import write_safetensors
from sdtune.pocket.evaluation.classifier import NOTHING, OBJECTS, Classifier, ceilings, load_classifier, reconstruct
from sdtune.pocket.pretraining.loop import Pretraining, pretrain
from sdtune.pocket.pretraining.vae import SEED
from sdtune.pocket.world.objects import BACKGROUNDS, PLACES, SIZES, STYLES
from sdtune.pocket.world.scenes import Scene, compose_scene, draw_scene
from sdtune.randomness import generator

IMAGES = 30_000
STEPS = 1_500
BATCH = 128

_ROUND_TRIP_EVERY = 4
_STRONG_BLUR, _MIX, _MILD_BLUR = 0.1, 0.1, 0.2  # fractions of a batch
# Ranges of the Gaussian sigma, as fractions of the object's box. A mild blur preserves details; a strong blur leaves at
# most four blobs across, or an empty background. The gap between them is ambiguous and is not sampled.
_MILD_SIGMA = (0.0, 0.025)
_STRONG_SIGMA = (0.1, 0.5)
_UNKNOWN = -100  # cross_entropy's ignore_index


def pool_scene(index: int) -> Scene:
    """Scene ``index`` of the classifier's training images: any object in any combination and style."""
    rng = generator(SEED, streams.CLASSIFIER_SCENE, index)
    thing, colour, size, where, style = (
        options[int(rng.integers(len(options)))]
        for options in (OBJECTS[:-1], list(BACKGROUNDS), list(SIZES), list(PLACES), STYLES)
    )
    return compose_scene(thing, colour, size, where, rng, style)


def pool_images(folder: Path, vae: AutoencoderKL, count: int) -> np.ndarray:
    """Images of scenes 0..count-1, every fourth reconstructed by ``vae``: uint8 [count, 64, 64, 3], memory-mapped.

    The file name in ``folder`` contains a hash of the VAE's weights, so each VAE has its own pool.
    """
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in vae.state_dict().values()))
    path = folder / f"pool-{SEED}-{count}-{weights.hexdigest()[:12]}.npy"
    if not path.exists():
        pool = np.stack([np.asarray(draw_scene(pool_scene(index))) for index in range(count)])
        pool[::_ROUND_TRIP_EVERY] = reconstruct(vae, pool[::_ROUND_TRIP_EVERY])
        with replacing(path, sync=False) as partial, partial.open("wb") as handle:
            np.save(handle, pool)
    images: np.ndarray = np.load(path, mmap_mode="r")
    return images


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


class PoolBatches:
    """Batches of pool images, some degraded: ``images`` and labels ``truth`` [B, 3] (object, size, style)."""

    def __init__(self, pool: np.ndarray) -> None:
        self.pool = pool
        scenes = [pool_scene(index) for index in range(len(pool))]
        labels = (OBJECTS, tuple(SIZES), STYLES)
        self.truth = np.array(
            [[names.index(x) for names, x in zip(labels, (s.thing, s.size, s.style), strict=True)] for s in scenes]
        )
        self.backgrounds = np.array([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        self.sides = np.array([scene.side for scene in scenes])

    def __call__(self, step: int) -> dict[str, Any]:
        rng = generator(SEED, streams.CLASSIFIER_BATCH, step)
        indices = rng.integers(len(self.pool), size=BATCH)
        images, truth = self.pool[indices], self.truth[indices]
        for k, index in enumerate(indices):
            choice = rng.random()
            if choice < _STRONG_BLUR + _MIX:
                strong = choice < _STRONG_BLUR
                images[k] = self._blur(int(index), _STRONG_SIGMA, rng) if strong else self.mix(int(index), rng)
                truth[k] = (OBJECTS.index(NOTHING), _UNKNOWN, _UNKNOWN)
            elif choice < _STRONG_BLUR + _MIX + _MILD_BLUR:
                images[k] = self._blur(int(index), _MILD_SIGMA, rng)
        return {"images": torch.from_numpy(images), "truth": torch.from_numpy(truth)}

    def _blur(self, index: int, sigma: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
        return _blurred(self.pool[index], float(rng.uniform(*sigma)) * int(self.sides[index]))

    def mix(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """Image ``index`` blended with an image of another object, uint8 [H, W, 3].

        Both have the same background. A blend of two backgrounds would have a color that no true image has, and the
        classifier would learn that color instead of the blended objects.
        """
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
        logits = self.classifier(batch["images"])
        loss = sum(
            (
                F.cross_entropy(head.float(), batch["truth"][:, k], ignore_index=_UNKNOWN)
                for k, head in enumerate(logits)
            ),
            start=torch.zeros((), device=logits[0].device),
        )
        return {"loss": loss, "object": (logits[0].argmax(1) == batch["truth"][:, 0]).float().mean().detach()}


def trained_classifier(folder: Path, vae: AutoencoderKL, steps: int = STEPS, images: int = IMAGES) -> Classifier:
    """Train on ``images`` images for ``steps`` steps; the pool and the checkpoint in ``folder`` allow resuming."""
    batches = PoolBatches(pool_images(folder, vae, images))
    torch.manual_seed(SEED)
    module = ClassifierTraining(steps)
    pretrain(module, batches, folder)
    return module.classifier.eval()


def save(classifier: Classifier, folder: Path) -> None:
    """Write ``classifier.safetensors`` (float16) and ``config.json`` (the output labels of each head)."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    objects, sizes, styles = classifier.names
    with replacing(folder) as target:
        write_safetensors(target / "classifier.safetensors", tensors, {})
        write_json(target / "config.json", {"objects": objects, "sizes": sizes, "styles": styles})


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval()
    save(trained_classifier(folder / "classifier-training", vae, steps), folder / "classifier")
    # Measure the saved classifier, so that the accuracy includes the rounding to float16.
    print(ceilings(load_classifier(folder / "classifier"), vae, SEED))


if __name__ == "__main__":
    main()
