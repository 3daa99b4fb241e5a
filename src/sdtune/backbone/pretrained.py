"""Where a backbone comes from: a pipeline folder in the diffusers layout, named by path or hub id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from sdtune.backbone.hash import check_weights, weights_hash
from sdtune.objective.prediction import PredictionType
from sdtune.objective.schedule import NoiseSchedule

if TYPE_CHECKING:
    from sdtune.backbone.backbone import Backbone

Component = Literal["unet", "vae", "text_encoder"]
COMPONENTS: tuple[Component, ...] = ("text_encoder", "unet", "vae")

_WEIGHTS = (".safetensors", "-?????-of-?????.safetensors")


@dataclass(frozen=True)
class Facts:
    """What is known of a backbone before any weights are read.

    ``factor``: pixels a latent cell; ``side``: the resolution that the UNet was made for, in pixels.
    """

    side: int
    factor: int
    latent_channels: int
    prediction_type: str
    max_tokens: int


class Pretrained:
    """A Stable Diffusion 1.x or 2.x pipeline on disk or on the hub; nothing is read until it is asked for.

    Args:
        path: a folder in the diffusers layout or a hub id; ``pocket`` is the backbone that ships with sdtune.
        revision: branch, tag or commit of a hub id.
        from_scratch: components whose weights are drawn anew from the seed instead of being read; only their
            ``config.json`` is needed.
        clip: the folder of a CLIP that measures this backbone's pictures, if one is at hand.
        guidance: the guidance scale that suits it when sampling.
        prediction_type: what the UNet is to predict, where that is not what its scheduler's config says.
        zero_terminal_snr: rescale the noise schedule so that its last step is pure noise (Lin et al. 2024).
    """

    def __init__(
        self,
        path: str = "pocket",
        revision: str | None = None,
        from_scratch: Sequence[Component] = (),
        clip: str | None = None,
        guidance: Annotated[float, Ge(0)] = 7.5,
        prediction_type: PredictionType | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        self.path, self.revision, self.from_scratch = path, revision, tuple(from_scratch)
        self.clip, self.guidance = clip, guidance
        self.prediction_type, self.zero_terminal_snr = prediction_type, zero_terminal_snr

    def _snapshot(self, patterns: list[str]) -> Path:
        if self.path == "pocket":
            from sdtune.pocket import path

            return path()
        local = Path(self.path).expanduser()
        if local.is_dir():
            return local
        if local.exists() or self.path.startswith(("/", ".", "~")) or self.path.count("/") != 1:
            raise ValueError(
                f"backbone.path: {self.path} is not a folder; name a pipeline folder (diffusers layout) or a hub id"
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            folder = Path(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"backbone.path: {self.path} is neither a local folder nor to be had from the hub ({reason})"
            ) from error
        # One commit for the whole run, whatever is pushed meanwhile; the folder of a snapshot is named by it.
        self.revision = folder.name
        return folder

    def config(self, component: str) -> dict[str, Any]:
        """``<component>``'s config as the pipeline folder holds it."""
        folder = self._snapshot(["*.json", "*/*.json", "tokenizer/*"])
        name = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(
            component, "config.json"
        )
        file = folder / "model_index.json" if component == "" else folder / component / name
        if not file.is_file():
            raise ValueError(f"backbone.path: {file} is missing; a pipeline folder in the diffusers layout has it")
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config with this backbone's own settings in it."""
        changed: dict[str, Any] = {"prediction_type": self.prediction_type} if self.prediction_type else {}
        if self.zero_terminal_snr:
            # Sampling must begin at the last step, where there is pure noise (Lin et al. 2024, section 3.3).
            changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**self.config("scheduler"), **changed}

    @cached_property
    def facts(self) -> Facts:
        """Sizes and settings from the config files alone; ValueError for a pipeline that is not SD 1.x or 2.x."""
        if "text_encoder_2" in self.config(""):
            raise ValueError(f"backbone.path: {self.path} has two text encoders (SDXL); SD 1.x and 2.x are supported")
        return self.read_facts()

    def read_facts(self) -> Facts:
        """The facts of any pipeline, trainable here or not."""
        unet, vae, scheduler = self.config("unet"), self.config("vae"), self.scheduler()
        channels = vae.get("latent_channels", 4)
        if unet["in_channels"] != channels:
            raise ValueError(
                f"backbone.path: {self.path} takes {unet['in_channels']} channels (an inpainting model?);"
                f" a text-to-image UNet with {channels} is needed"
            )
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        NoiseSchedule.from_config(scheduler)  # refuses one that cannot be trained
        return Facts(
            side=int(unet["sample_size"]) * factor,
            factor=factor,
            latent_channels=channels,
            prediction_type=scheduler.get("prediction_type", "epsilon"),
            max_tokens=int(self.config("text_encoder").get("max_position_embeddings", 77)),
        )

    def folder(self) -> Path:
        """The local folder with everything that loading needs."""
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        # Hub repositories hold the same weights several times over (fp16, non-EMA, .bin): take the one that is read.
        stems = ("diffusion_pytorch_model", "model")
        weights = [f"{name}/{stem}{end}" for name in COMPONENTS for stem in stems for end in _WEIGHTS]
        return self._snapshot(["*.json", "*/*.json", "tokenizer/*", *weights])

    def check(self) -> None:
        """ValueError for what loading would miss: weights as safetensors, whole, and the tokenizer's files."""
        folder = self.folder()
        check_weights(folder, [name for name in COMPONENTS if name not in self.from_scratch])
        names = {file.name for file in (folder / "tokenizer").glob("*")}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise ValueError(
                f"backbone.path: {folder / 'tokenizer'} lacks tokenizer.json, or vocab.json and merges.txt; copy them"
            )

    def hash(self) -> str:
        """The weights' sha256 (:func:`sdtune.backbone.hash.weights_hash`), those drawn from scratch left out."""
        return weights_hash(self.folder(), [name for name in COMPONENTS if name not in self.from_scratch])

    def encoder_key(self, component: Component, precision: str) -> str:
        """What an encoder's outputs depend on: weights, config, precision, and a text encoder's tokenizer.

        Caches of its outputs are kept under this name.
        """
        assert component not in self.from_scratch
        digest = hashlib.sha256(f"{precision}/{weights_hash(self.folder(), [component])}".encode())
        digest.update(json.dumps(self.config(component), sort_keys=True).encode())
        for file in sorted((self.folder() / "tokenizer").glob("*")) if component == "text_encoder" else ():
            digest.update(file.read_bytes())
        return digest.hexdigest()[:32]

    def drawing_key(self) -> str:
        """What this backbone's pictures depend on beside prompt, seed and sampling: weights, configs, tokenizer."""
        digest = hashlib.sha256(f"{self.hash()}/{self.from_scratch}".encode())
        configs = [self.scheduler(), *(self.config(component) for component in COMPONENTS)]
        digest.update(json.dumps(configs, sort_keys=True).encode())
        for file in sorted((self.folder() / "tokenizer").glob("*")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:32]

    def load(self, seed: int = 0) -> Backbone:
        """The backbone with its weights in float32, in eval mode, every parameter frozen."""
        from sdtune.backbone.backbone import load

        return load(self, seed)
