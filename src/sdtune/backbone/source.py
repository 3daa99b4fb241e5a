"""The source of a backbone: a pipeline folder in the diffusers layout, named by path or hub id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from sdtune.backbone.families import FAMILIES, GUIDANCE, Component, Facts, family_by
from sdtune.backbone.locate import MODELS, configured, local, read_config, snapshot, there, with_vae
from sdtune.backbone.weight_files import check_files, shapes, variant_of, weight_files, weights_hash
from sdtune.errors import UserError
from sdtune.formats.files import read_safetensors
from sdtune.formats.keys import canonical_key, check_keys
from sdtune.formats.original import Family
from sdtune.formats.pipeline import STEMS, weights_name
from sdtune.objective.prediction import PredictionType
from sdtune.objective.schedule import NoiseSchedule
from sdtune.paths import pocket_pipeline

if TYPE_CHECKING:
    from torch import Tensor

_JSON = ["*.json", "*/*.json", "tokenizer*/*"]


class PipelineSource:
    """A Stable Diffusion on disk or on the hub; nothing is read until it is asked for.

    Args:
        path: a folder in the diffusers layout, a single file in the original layout (``.safetensors`` or ``.ckpt``),
            or a hub id; ``pocket`` is the backbone that ships with sdtune.
        revision: branch, tag or commit of a hub id.
        from_scratch: components whose weights are drawn anew from the seed instead of being read; only their
            ``config.json`` is needed.
        clip: the folder of a CLIP that measures this backbone's images, if one is at hand.
        guidance: the guidance scale that suits it when sampling.
        prediction_type: what the UNet is to predict, where that is not what its scheduler's config says.
        zero_terminal_snr: rescale the noise schedule so that its last step is pure noise (Lin et al. 2024).
        family: what it must be; anything if None.
        variant: of a folder's or hub id's weight files, such as ``fp16``; the plain ones if None.
        config: a folder of configs that a single file's models have; those of its family that ship with sdtune if None.
        vae: a VAE to take in place of its own: a folder in the diffusers layout, a single file, or a hub id.
        allow_pickle: read a ``.ckpt``, with torch's ``weights_only``.
        clip_skip: how many of the text encoder's last layers are left out, counted as diffusers does: 0 is none, and
            1 is what kohya's tools and A1111 call clip skip 2. SDXL leaves one out to begin with.
        max_tokens: prompts of up to so many tokens, start and end apart, in windows of the text encoder's length; one
            window (75 tokens of CLIP's) if None.
    """

    def __init__(
        self,
        path: str = "pocket",
        revision: str | None = None,
        from_scratch: Sequence[Component] = (),
        clip: str | None = None,
        guidance: Annotated[float, Ge(0)] = GUIDANCE["sd1"],
        prediction_type: PredictionType | None = None,
        zero_terminal_snr: bool = False,
        family: Family | None = None,
        variant: str | None = None,
        config: str | None = None,
        vae: str | None = None,
        allow_pickle: bool = False,
        clip_skip: Annotated[int, Ge(0)] = 0,
        max_tokens: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        self.path, self.revision, self.from_scratch = path, revision, tuple(from_scratch)
        self.clip, self.guidance = clip, guidance
        self.prediction_type, self.zero_terminal_snr = prediction_type, zero_terminal_snr
        self.family, self.variant, self.vae, self.allow_pickle = family, variant, vae, allow_pickle
        self.config_folder, self.clip_skip, self.max_tokens = config, clip_skip, max_tokens

    # --- where it lies

    def _place(self, weights: bool) -> Path:
        """The pipeline folder with its configs, and its weights where they are wanted."""
        if self.path == "pocket":
            return pocket_pipeline()
        place = local(self.path, "backbone.path")
        if place is None:
            return self._hub_folder() if weights else self._hub_configs
        if place.is_dir():
            return place
        from sdtune.backbone.single_file import unpacked

        config = Path(self.config_folder).expanduser() if self.config_folder else None
        config = pocket_pipeline() if self.config_folder == "pocket" else config
        if config is not None and not (config / "model_index.json").is_file():
            raise UserError(
                f"{config / 'model_index.json'} is missing",
                key="backbone.config",
                remedy="name a pipeline folder's configs",
            )
        return unpacked(place, config, self.allow_pickle)

    @cached_property
    def _hub_configs(self) -> Path:
        """The local folder with the configs and tokenizers of a hub repository."""
        return snapshot(self.path, self.revision, _JSON, configured, "backbone.path")

    @property
    def commit(self) -> str | None:
        """The commit hash of a hub id after its configs are read, then fixed; before that, ``revision``."""
        configs: Path | None = vars(self).get("_hub_configs")
        return self.revision if configs is None else configs.name  # the folder of a snapshot is named by it

    def _hub_folder(self) -> Path:
        # Repositories hold the same weights several times over (fp16, non-EMA, .bin): take those that are read.
        mark = f".{self.variant}" if self.variant else ""
        ends = (f"{mark}.safetensors", f"{mark}-?????-of-?????.safetensors")
        names = [name for name in MODELS if not (name == "vae" and self.vae)]
        patterns = [f"{name}/{stem}{end}" for name in names for stem in STEMS for end in ends]

        def complete(folder: Path) -> bool:
            wanted = (name for name in self._weighed if not (name == "vae" and self.vae))
            return configured(folder) and all(there(folder, name, self.variant) for name in wanted)

        return snapshot(self.path, self._hub_configs.name, [*_JSON, *patterns], complete, "backbone.path")

    def _with_vae(self, pipeline: Path) -> Path:
        if self.vae is None:
            return pipeline
        place = local(self.vae, "backbone.vae")
        if place is None:
            names = ["config.json", weights_name("vae")]
            place = snapshot(
                self.vae, None, names, lambda folder: all((folder / n).is_file() for n in names), "backbone.vae"
            )
        if place.is_file():
            from sdtune.backbone.single_file import unpacked_vae

            place = unpacked_vae(place, pipeline, self.allow_pickle)
        file = place / "config.json"
        if not file.is_file() or read_config(file).get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(
                f"{place} is no AutoencoderKL's folder", key="backbone.vae", remedy="name one, with its config.json"
            )
        return with_vae(pipeline, place)

    @cached_property
    def _configs(self) -> Path:
        return self._with_vae(self._place(weights=False))

    @cached_property
    def _folder(self) -> Path:
        return self._with_vae(self._place(weights=True))

    def folder(self) -> Path:
        """The local folder with everything that loading needs."""
        return self._folder

    # --- what it is

    def config(self, component: str) -> dict[str, Any]:
        """``<component>``'s config as the pipeline folder holds it."""
        name = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(
            component, "config.json"
        )
        file = self._configs / "model_index.json" if component == "" else self._configs / component / name
        if not file.is_file():
            lora = component == "" and any(self._configs.glob("*.safetensors"))
            how = "a LoRA goes to adapters=" if lora else "a pipeline folder in the diffusers layout has it"
            raise UserError(f"{file} is missing; {how}", key="backbone.path")
        return read_config(file)

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config with this backbone's own settings in it."""
        changed: dict[str, Any] = {"prediction_type": self.prediction_type} if self.prediction_type else {}
        if self.zero_terminal_snr:
            # Sampling must begin at the last step, where there is pure noise (Lin et al. 2024, section 3.3).
            changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**self.config("scheduler"), **changed}

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Its text encoders' folders, SDXL's two."""
        second = (self.config("").get("text_encoder_2") or [None])[0]
        return ("text_encoder", "text_encoder_2") if second else ("text_encoder",)

    @property
    def components(self) -> tuple[str, ...]:
        """The folders of its models."""
        return (*self.text_encoders, "unet", "vae")

    @property
    def _weighed(self) -> tuple[str, ...]:
        return tuple(name for name in self.components if not self.drawn_anew(name))

    def drawn_anew(self, component: str) -> bool:
        """Whether ``component`` begins with random weights."""
        return component.removesuffix("_2") in self.from_scratch

    @cached_property
    def facts(self) -> Facts:
        """Sizes and settings from the config files alone; UserError for a pipeline that cannot be trained here."""
        index = self.config("")
        if "text_encoder_2" in index and not (index.get("text_encoder") or [None])[0]:
            raise UserError(
                f"{self.path} is SDXL's refiner; the base model is what can be fine-tuned", key="backbone.path"
            )
        unet, vae, scheduler = self.config("unet"), self.config("vae"), self.scheduler()
        channels = vae.get("latent_channels", 4)
        if unet["in_channels"] != channels:
            raise UserError(
                f"{self.path} takes {unet['in_channels']} channels (an inpainting model?); a"
                f" text-to-image UNet with {channels} is needed",
                key="backbone.path",
            )
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        NoiseSchedule.from_config(scheduler)  # refuses one that cannot be trained
        length = int(self.config("text_encoder").get("max_position_embeddings", 77))
        layers = int(self.config("text_encoder").get("num_hidden_layers", 12)) - (len(self.text_encoders) > 1)
        if self.clip_skip >= layers:
            raise UserError(
                f"{self.clip_skip} of {layers} layers", key="backbone.clip_skip", remedy=f"give {layers - 1} at most"
            )
        windows = -(-self.max_tokens // (length - 2)) if self.max_tokens else 1
        return Facts(
            side=int(unet.get("sample_size", 64)) * factor,
            factor=factor,
            latent_channels=channels,
            prediction_type=scheduler.get("prediction_type", "epsilon"),
            max_tokens=windows * (length - 2) + 2,
            family=self._family(unet),
            windows=windows,
        )

    def _family(self, unet: dict[str, Any]) -> Family:
        found = family_by(unet, two_encoders=len(self.text_encoders) > 1)
        if self.family not in (None, found):
            asked, kind = FAMILIES[self.family or found], FAMILIES[found]
            raise UserError(
                f"{self.path} is {kind[0]}, and {asked[1]} asks for {asked[0]}",
                key="backbone.path",
                remedy=f"give {kind[1]}",
            )
        return found

    # --- its weights

    def _files(self, names: Sequence[str]) -> dict[str, list[Path]]:
        return {
            name: weight_files(self.folder(), name, None if name == "vae" and self.vae else self.variant)
            for name in names
        }

    def check(self) -> None:
        """UserError for what loading would miss: weights as safetensors, whole, of the configs' models; tokenizers."""
        folder, files = self.folder(), self._files(self._weighed)
        check_files(files)
        from sdtune.backbone.models import wanted_shapes

        for name, each in files.items():
            check_keys(f"backbone.path: {folder / name}", shapes(each, name), wanted_shapes(name, folder))
        for name in self.tokenizers:
            names = {file.name for file in (folder / name).glob("*")}
            if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
                raise UserError(
                    f"{folder / name} lacks tokenizer.json, or vocab.json and merges.txt",
                    key="backbone.path",
                    remedy="copy them",
                )

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The folders of its tokenizers."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    def hash(self) -> str:
        """sha256 of the weights that were read from files (:func:`~sdtune.backbone.weight_files.weights_hash`)."""
        return weights_hash(self._files(self._weighed))

    def weights(self, without: Sequence[str] = ()) -> dict[str, list[Path]]:
        """The files that hold each component's weights, those named in ``without`` left out."""
        return self._files([name for name in self.components if name not in without])

    def tensors(self, component: str) -> dict[str, Tensor]:
        """``component``'s weights as its files hold them, by canonical key."""
        read = [read_safetensors(file)[0] for file in self._files([component])[component]]
        return {canonical_key(component, key): value for tensors in read for key, value in tensors.items()}

    def weights_variant(self, component: str) -> str | None:
        """The variant whose files hold ``component``."""
        return variant_of(self._files([component])[component])

    def encoder_key(self, component: Component, precision: str) -> str:
        """What an encoder's outputs depend on: weights, config, precision, and of text encoders tokenizer and settings.

        Caches of its outputs are kept under this name.
        """
        assert component not in self.from_scratch
        names = self.text_encoders if component == "text_encoder" else (component,)
        digest = hashlib.sha256(f"{precision}/{weights_hash(self._files(names))}".encode())
        for name in names:
            digest.update(json.dumps(self.config(name), sort_keys=True).encode())
        if component == "text_encoder":
            self._add_text_settings(digest)
        return digest.hexdigest()[:32]

    def _add_text_settings(self, digest: Any) -> None:
        for name in self.tokenizers:
            for file in sorted((self.folder() / name).glob("*")):
                digest.update(file.read_bytes())
        if self.clip_skip or self.facts.windows > 1:
            digest.update(f"{self.clip_skip}/{self.facts.windows}".encode())

    def drawing_key(self) -> str:
        """Cache key of images drawn by this backbone: its weights, configs and tokenizer."""
        digest = hashlib.sha256(f"{self.hash()}/{self.from_scratch}".encode())
        configs = [self.scheduler(), *(self.config(component) for component in self.components)]
        digest.update(json.dumps(configs, sort_keys=True).encode())
        self._add_text_settings(digest)
        return digest.hexdigest()[:32]
