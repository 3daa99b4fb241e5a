"""Source of a backbone: a diffusers pipeline folder, a single-file checkpoint or a hub id; configs and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Interval

from sdtune.backbone.families import (
    FAMILIES,
    SD1,
    STATED_PREDICTION,
    T5,
    Component,
    Facts,
    Family,
    FamilyName,
    Quantization,
    denoiser_folder,
    family_of_configs,
    family_of_folder,
)
from sdtune.backbone.foreign import unreadable_as_user_error
from sdtune.backbone.locate import (
    MODELS,
    find_local,
    has_all_configs,
    has_weight_files,
    hub_folder,
    read_config,
    with_parts,
)
from sdtune.backbone.weight_files import check_files, shapes, variant_of, weight_files, weights_hash
from sdtune.errors import UserError
from sdtune.formats.files import read_safetensors
from sdtune.formats.keys import canonical_key, check_keys
from sdtune.formats.pipeline import STEMS, weights_name
from sdtune.objective.path import FLOW_SHIFT, is_flow, path_from_config, shift_of
from sdtune.objective.prediction import PredictionType
from sdtune.paths import pocket_pipeline

if TYPE_CHECKING:
    from torch import Tensor

_JSON = ["*.json", "*/*.json", "tokenizer*/*"]

_CACHE_LAYOUT = 2
"""Version of the entries in the caches of encoder outputs; increase it to invalidate them."""


class PipelineSource:
    """Source of a Stable Diffusion model on disk or on the Hugging Face hub; files are read on first use.

    Args:
        path: a folder in the diffusers layout, a single file in the original layout (``.safetensors`` or ``.ckpt``),
            or a hub id; ``pocket`` is the backbone included in sdtune.
        revision: branch, tag or commit of a hub id.
        from_scratch: components with weights initialized randomly from the seed; only their ``config.json`` is needed.
        clip: folder of a CLIP model for evaluating images of this backbone, if available.
        guidance: default guidance scale for sampling.
        prediction_type: prediction type of the denoiser; if None, that of the scheduler config.
        flow_shift: shift of the noise levels of a flow model, in training and sampling; if None, that of the scheduler
            config, or 3.
        zero_terminal_snr: rescale the noise schedule so that its last step is pure noise (Lin et al. 2024).
        family: required model family; any if None.
        variant: variant of the weight files of a folder or hub id, such as ``fp16``; if None, files without a
            variant, or the only variant if there are no others.
        config: pipeline folder with the configs of a single file's models; if None, the configs of its family that are
            included in sdtune.
        vae: VAE to use instead of the pipeline's: a folder in the diffusers layout, a single file, or a hub id.
        allow_pickle: allow reading a ``.ckpt``, with torch's ``weights_only``.
        clip_skip: number of skipped last layers of the text encoder, counted as in diffusers: 0 skips none, 1 is clip
            skip 2 of kohya's tools and A1111. SDXL always skips one more layer.
        max_tokens: maximum number of tokens per prompt, without start and end token, rounded up to whole windows of
            the text encoder (75 tokens for CLIP); if None, one window.
        text_encoder, text_encoder_2, text_encoder_3: single files with text encoders of SD 3, to use instead of the
            pipeline's; for a single file without them.
        tokenizer_3: folder or hub id of T5's tokenizer, for a single file: it is not included in sdtune.
        t5: use T5, where the model has it; without it, its text embeddings are zeros.
        t5_tokens: number of T5 tokens per prompt; padding counts, so sampling needs the number of the training.
        quantize: format in which the frozen weights of the denoiser and the text encoders are kept in memory; if None,
            they are not quantized. Exports use the weights of the files.
    """

    def __init__(
        self,
        path: str = "pocket",
        revision: str | None = None,
        from_scratch: Sequence[Component] = (),
        clip: str | None = None,
        guidance: Annotated[float, Ge(0)] = SD1.guidance,
        prediction_type: PredictionType | None = None,
        flow_shift: Annotated[float, Gt(0)] | None = None,
        zero_terminal_snr: bool = False,
        family: FamilyName | None = None,
        variant: str | None = None,
        config: str | None = None,
        vae: str | None = None,
        allow_pickle: bool = False,
        clip_skip: Annotated[int, Ge(0)] = 0,
        max_tokens: Annotated[int, Ge(1)] | None = None,
        text_encoder: str | None = None,
        text_encoder_2: str | None = None,
        text_encoder_3: str | None = None,
        tokenizer_3: str | None = None,
        t5: bool = True,
        t5_tokens: Annotated[int, Interval(ge=1, le=512)] = 256,
        quantize: Quantization | None = None,
    ) -> None:
        self.path, self.revision, self.from_scratch = path, revision, tuple(from_scratch)
        self.clip, self.guidance = clip, guidance
        self.prediction_type, self.flow_shift = prediction_type, flow_shift
        self.zero_terminal_snr = zero_terminal_snr
        self.family, self.variant, self.vae, self.allow_pickle = family, variant, vae, allow_pickle
        self.config_folder, self.clip_skip, self.max_tokens = config, clip_skip, max_tokens
        self.quantize = quantize
        files = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, T5: text_encoder_3}
        self._encoder_files = {name: file for name, file in files.items() if file is not None}
        self.tokenizer_3, self.t5, self.t5_tokens = tokenizer_3, t5, t5_tokens

    # --- location

    def _pipeline_folder(self, weights: bool) -> Path:
        """Pipeline folder with the configs, and with the weights if ``weights``."""
        if self.path == "pocket":
            return pocket_pipeline()
        local_path = find_local(self.path, "backbone.path")
        if local_path is None:
            return self._hub_folder() if weights else self._hub_configs
        if local_path.is_dir():
            return local_path
        from sdtune.backbone.single_file import convert_checkpoint

        config = Path(self.config_folder).expanduser() if self.config_folder else None
        config = pocket_pipeline() if self.config_folder == "pocket" else config
        if config is not None and not (config / "model_index.json").is_file():
            raise UserError(
                f"{config / 'model_index.json'} is missing",
                key="backbone.config",
                remedy="use a pipeline folder with its configs",
            )
        provided = {*self._replaced, *([] if self.t5 else [T5])}
        return convert_checkpoint(local_path, config, self.allow_pickle, provided)

    @cached_property
    def _hub_configs(self) -> Path:
        """Local snapshot folder with the configs and tokenizers of a hub repository."""
        return hub_folder(self.path, self.revision, _JSON, has_all_configs, "backbone.path")

    @property
    def commit(self) -> str | None:
        """Commit hash of a hub id once its configs are loaded; before that, ``revision``."""
        configs: Path | None = vars(self).get("_hub_configs")
        return self.revision if configs is None else configs.name  # a snapshot folder is named after its commit

    @property
    def _replaced(self) -> set[str]:
        """Components whose weights come from another place."""
        return {*self._encoder_files, *(["vae"] if self.vae else [])}

    def _hub_folder(self) -> Path:
        # Repositories contain several copies of the weights (fp16, non-EMA, .bin); download only those that are read.
        suffix = f".{self.variant}" if self.variant else ""
        endings = (f"{suffix}.safetensors", f"{suffix}-?????-of-?????.safetensors")
        names = [name for name in MODELS if name not in self._replaced and (self.t5 or name != T5)]
        patterns = [f"{name}/{stem}{end}" for name in names for stem in STEMS for end in endings]

        def complete(folder: Path) -> bool:
            required = (name for name in self._pretrained_components if name not in self._replaced)
            return has_all_configs(folder) and all(has_weight_files(folder, name, self.variant) for name in required)

        return hub_folder(self.path, self._hub_configs.name, [*_JSON, *patterns], complete, "backbone.path")

    def _with_parts(self, pipeline: Path) -> Path:
        """``pipeline`` with the VAE, text encoders and tokenizer that replace its own."""
        parts = {name: self._encoder_folder(name, file, pipeline) for name, file in self._encoder_files.items()}
        if self.vae is not None:
            parts["vae"] = self._vae_folder(self.vae, pipeline)
        if self.tokenizer_3 is not None:
            parts["tokenizer_3"] = _tokenizer_folder(self.tokenizer_3)
        return with_parts(pipeline, parts) if parts else pipeline

    def _encoder_folder(self, component: str, path: str, pipeline: Path) -> Path:
        key, file = f"backbone.{component}", Path(path).expanduser()
        if component not in family_of_folder(pipeline, "backbone.path").layout.optional:
            raise UserError(
                f"{self.path} has no place for it", key=key, remedy="remove it; only models of SD 3 take such files"
            )
        if component == T5 and not self.t5:
            raise UserError("backbone.t5=false leaves T5 out", key=key, remedy="remove one of the two")
        if not file.is_file():
            raise UserError(f"{path} is not a file", key=key, remedy="set it to a .safetensors file")
        from sdtune.backbone.single_file import convert_encoder

        return convert_encoder(file, component, pipeline, self.allow_pickle)

    def _vae_folder(self, path: str, pipeline: Path) -> Path:
        vae = find_local(path, "backbone.vae")
        if vae is None:
            names = ["config.json", weights_name("vae")]
            vae = hub_folder(
                path, None, names, lambda folder: all((folder / n).is_file() for n in names), "backbone.vae"
            )
        if vae.is_file():
            from sdtune.backbone.single_file import convert_vae

            vae = convert_vae(vae, pipeline, self.allow_pickle)
        file = vae / "config.json"
        if not file.is_file() or read_config(file).get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(
                f"{vae} is not the folder of an AutoencoderKL",
                key="backbone.vae",
                remedy="use a VAE folder with its config.json",
            )
        return vae

    @cached_property
    def _configs(self) -> Path:
        return self._with_parts(self._pipeline_folder(weights=False))

    @cached_property
    def _folder(self) -> Path:
        return self._with_parts(self._pipeline_folder(weights=True))

    def folder(self) -> Path:
        """Local pipeline folder with all files that loading needs."""
        return self._folder

    # --- configs and properties

    def config(self, component: str) -> dict[str, Any]:
        """Config of ``component`` in the pipeline folder; the pipeline index if ``component`` is empty.

        Raises:
            UserError: the file is missing or unreadable.
        """
        name = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(
            component, "config.json"
        )
        file = self._configs / "model_index.json" if component == "" else self._configs / component / name
        if not file.is_file():
            lora = component == "" and any(self._configs.glob("*.safetensors"))
            remedy = "use adapters= for a LoRA" if lora else "use a pipeline folder in the diffusers layout"
            raise UserError(f"{file} is missing", key="backbone.path", remedy=remedy)
        return read_config(file)

    def scheduler(self) -> dict[str, Any]:
        """Scheduler config of the pipeline, changed by ``prediction_type``, ``flow_shift`` and ``zero_terminal_snr``.

        Raises:
            UserError: a setting contradicts the config, or another setting.
        """
        config = self.config("scheduler")
        stated = config.pop(STATED_PREDICTION, "flow_prediction" if is_flow(config) else None)
        if stated is not None and self.prediction_type not in (None, stated):
            raise UserError(
                f"got {self.prediction_type}, but {self.path} states {stated}",
                key="backbone.prediction_type",
                remedy=f"remove it, or set {stated}",
            )
        if "flow_prediction" in (stated, self.prediction_type):
            return self._flow_scheduler(config)
        if self.flow_shift is not None:
            raise UserError(
                f"got {self.flow_shift:g}, but {self.path} is not a flow model",
                key="backbone.flow_shift",
                remedy="remove it, or set backbone.prediction_type=flow_prediction",
            )
        overrides: dict[str, Any] = {"prediction_type": self.prediction_type} if self.prediction_type else {}
        if self.zero_terminal_snr:
            # Sampling must start at the last step, which is pure noise (Lin et al. 2024, section 3.3).
            overrides |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**config, **overrides}

    def _flow_scheduler(self, config: dict[str, Any]) -> dict[str, Any]:
        """Scheduler config of a flow model."""
        if self.zero_terminal_snr:
            raise UserError(
                "has no meaning for a flow model, whose last step is pure noise",
                key="backbone.zero_terminal_snr",
                remedy="remove it",
            )
        # Schedulers of diffusion models may store an unused flow_shift.
        shift = self.flow_shift or (shift_of(config) if is_flow(config) else FLOW_SHIFT)
        if "FlowMatch" in str(config.get("_class_name")):
            return {**config, "shift": shift}
        if config.get("use_flow_sigmas"):
            return {**config, "prediction_type": "flow_prediction", "flow_shift": shift}
        # The pipelines of UNets need a scheduler with the interface of DDPM, which diffusers' Euler scheduler for flows
        # has not.
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": config.get("num_train_timesteps", 1000),
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        }

    @cached_property
    def _family(self) -> Family:
        """Family of the pipeline.

        Raises:
            UserError: it is of no family, or not of the required one.
        """
        index = self.config("")
        if "text_encoder_2" in index and not (index.get("text_encoder") or [None])[0]:
            raise UserError(f"{self.path} is the SDXL refiner", key="backbone.path", remedy="use the SDXL base model")
        folder = denoiser_folder(index)
        family = family_of_configs(index, self.config(folder), str(self._configs / folder / "config.json"))
        if self.family not in (None, family.name):
            required = FAMILIES[self.family or family.name]
            raise UserError(
                f"{self.path} is {family.title}, but {required.option} requires {required.title}",
                key="backbone.path",
                remedy=f"use {family.option}",
            )
        return family

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Folder names of the text encoders; without T5 if it is not used."""
        return tuple(name for name in self._family.text_encoders if self.t5 or name != T5)

    @property
    def denoiser_folder(self) -> str:
        """Folder name of the denoiser, in the pipeline and in the names of LoRA files."""
        return self._family.denoiser

    def folder_of(self, component: str) -> str:
        """Folder name of a component of the backbone."""
        return self.denoiser_folder if component == "denoiser" else component

    @property
    def components(self) -> tuple[str, ...]:
        """Folder names of the models."""
        return (*self.text_encoders, self.denoiser_folder, "vae")

    @property
    def _pretrained_components(self) -> tuple[str, ...]:
        return tuple(name for name in self.components if not self.is_from_scratch(name))

    def is_from_scratch(self, component: str) -> bool:
        """Whether the weights of the model in the folder ``component`` are initialized randomly."""
        name = "denoiser" if component == self.denoiser_folder else component.removesuffix("_2")
        return name in self.from_scratch

    @cached_property
    def facts(self) -> Facts:
        """Properties of the backbone, read from the config files alone.

        Raises:
            UserError: sdtune cannot train this pipeline, or a config lacks a value.
        """
        with unreadable_as_user_error(self._configs, "backbone.path"):
            return self._read_facts()

    def _read_facts(self) -> Facts:
        denoiser, vae, scheduler = self.config(self.denoiser_folder), self.config("vae"), self.scheduler()
        channels = vae.get("latent_channels", 4)
        if denoiser["in_channels"] != channels:
            raise UserError(
                f"the denoiser of {self.path} has {denoiser['in_channels']} input channels (an inpainting model?)",
                key="backbone.path",
                remedy=f"use a text-to-image model with {channels} input channels",
            )
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        path = path_from_config(scheduler)  # raises UserError for an unsupported one
        self._check_latents(vae)
        length = int(self.config("text_encoder").get("max_position_embeddings", 77))
        layers = int(self.config("text_encoder").get("num_hidden_layers", 12)) - (len(self.text_encoders) > 1)
        if self.clip_skip >= layers:
            raise UserError(
                f"cannot skip {self.clip_skip} of {layers} layers",
                key="backbone.clip_skip",
                remedy=f"set at most {layers - 1}",
            )
        self._check_max_tokens(length - 2)
        windows = -(-self.max_tokens // (length - 2)) if self.max_tokens else 1
        return Facts(
            side=int(denoiser.get("sample_size", 64)) * factor,
            factor=factor,
            latent_channels=channels,
            prediction_type=path.prediction_type,
            max_tokens=windows * (length - 2) + 2,
            family=self._family,
            windows=windows,
            scheduler=str(scheduler.get("_class_name") or ""),
            train_timesteps=path.steps,
            patch=int(denoiser.get("patch_size", 1)),
            blocks=int(denoiser.get("num_layers", 0)),
            largest_side=_largest_side(denoiser, factor),
            t5_tokens=self.t5_tokens if self._family.has_t5 else 0,
            min_steps=1 if scheduler.get("skip_prk_steps") or scheduler.get("rescale_betas_zero_snr") else 4,
        )

    def _check_max_tokens(self, window: int) -> None:
        if self._family.has_t5 and self.max_tokens is not None and self.max_tokens > window:
            raise UserError(
                f"the CLIP text encoders of {self._family.title} read {window} tokens; only T5 reads more",
                key="backbone.max_tokens",
                remedy="remove it, or set backbone.t5_tokens",
            )

    def _check_latents(self, vae: dict[str, Any]) -> None:
        if vae.get("latents_mean") or vae.get("latents_std"):
            raise UserError(
                f"the VAE of {self.path} normalizes its latents with latents_mean and latents_std",
                key="backbone.path",
                remedy="use a model whose VAE has only a scaling_factor",
            )

    # --- weights

    def _files(self, names: Sequence[str]) -> dict[str, list[Path]]:
        def variant(name: str) -> str | None:
            return None if name in self._replaced else self.variant

        return {name: weight_files(self.folder(), name, variant(name)) for name in names}

    def check(self) -> None:
        """Raise UserError if weights or tokenizers are missing, damaged or inconsistent with the configs."""
        folder, files = self.folder(), self._files(self._pretrained_components)
        check_files(files)
        from sdtune.backbone.models import model_shapes
        from sdtune.backbone.quantization import check_quantization

        check_quantization(self.quantize, ())
        for name, component_files in files.items():
            check_keys(f"backbone.path: {folder / name}", shapes(component_files, name), model_shapes(name, folder))
        for name in self.tokenizers:
            self._check_tokenizer(folder / name)

    def _check_tokenizer(self, folder: Path) -> None:
        file_names = {file.name for file in folder.glob("*")}
        if folder.name == "tokenizer_3" and not {"tokenizer.json", "spiece.model"} & file_names:
            raise UserError(
                f"{self.tokenizer_3 or self.path} has no T5 tokenizer",
                key="backbone.tokenizer_3",
                remedy="set it to a folder or hub id, such as google/t5-v1_1-xxl, or set backbone.t5=false",
            )
        is_clip = folder.name != "tokenizer_3"
        if is_clip and "tokenizer.json" not in file_names and not {"vocab.json", "merges.txt"} <= file_names:
            raise UserError(
                f"{folder} has neither tokenizer.json nor vocab.json and merges.txt",
                key="backbone.path",
                remedy="copy the tokenizer files",
            )

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folder names of the tokenizers."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    def tokenizer_folder(self) -> Path:
        """Folder of the first text encoder's tokenizer. Reads no weights."""
        return self._configs / self.tokenizers[0]

    def tokenizer_folders(self, encoders: Sequence[str] | None) -> list[Path]:
        """Folders of the tokenizers of ``encoders``; None: the first, whose vocabulary all CLIP text encoders have."""
        names = None if encoders is None else [name.replace("text_encoder", "tokenizer") for name in encoders]
        return [self.tokenizer_folder()] if names is None else [self._configs / name for name in names]

    def hash(self) -> str:
        """SHA-256 of the weights that are read from files (:func:`~sdtune.backbone.weight_files.weights_hash`).

        T5 is left out: it is optional and comes in several precisions, but artifacts fit the model with any of them.
        """
        return weights_hash(self._files([name for name in self._pretrained_components if name != T5]))

    def weights(self, without: Sequence[str] = ()) -> dict[str, list[Path]]:
        """Weight files of each component, except those in ``without``."""
        return self._files([name for name in self.components if name not in without])

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Weights of ``component`` in the dtype of its files, by canonical key."""
        loaded = [read_safetensors(file)[0] for file in self._files([component])[component]]
        return {canonical_key(component, key): value for tensors in loaded for key, value in tensors.items()}

    def weights_variant(self, component: str) -> str | None:
        """Weight variant of the files of ``component``."""
        return variant_of(self._files([component])[component])

    def encoder_cache_key(self, component: Component, precision: str) -> str:
        """Cache key of an encoder's outputs: a hash of its weights, config and precision.

        The key of the text encoders also depends on tokenizers, ``clip_skip``, ``max_tokens`` and ``quantize``.
        """
        assert component not in self.from_scratch
        names = self.text_encoders if component == "text_encoder" else (component,)
        digest = hashlib.sha256(f"{_CACHE_LAYOUT}/{precision}/{weights_hash(self._files(names))}".encode())
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
        if self.facts.t5_tokens:
            digest.update(f"t5/{self.t5}/{self.facts.t5_tokens}".encode())
        if self.quantize:
            digest.update(self.quantize.encode())

    def image_cache_key(self) -> str:
        """Cache key of images generated by this backbone: a hash of weights, configs, tokenizers and text settings."""
        weights = weights_hash(self._files(self._pretrained_components))
        digest = hashlib.sha256(f"{weights}/{self.from_scratch}".encode())
        configs = [self.scheduler(), *(self.config(component) for component in self.components)]
        digest.update(json.dumps(configs, sort_keys=True).encode())
        self._add_text_settings(digest)
        return digest.hexdigest()[:32]


def _tokenizer_folder(path: str) -> Path:
    """Local folder of T5's tokenizer ``path``, a folder or a hub id."""
    key = "backbone.tokenizer_3"
    folder = find_local(path, key)
    if folder is None:
        names = ["tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json"]
        folder = hub_folder(path, None, names, lambda found: any((found / name).is_file() for name in names), key)
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder", key=key, remedy="set it to a folder with tokenizer.json")
    return folder / "tokenizer_3" if (folder / "tokenizer_3").is_dir() else folder  # that of a pipeline


def _largest_side(denoiser: Mapping[str, Any], factor: int) -> int | None:
    positions = denoiser.get("pos_embed_max_size")
    return None if positions is None else int(positions) * int(denoiser["patch_size"]) * factor


def unused_folders(source: PipelineSource) -> list[str]:
    """Folders of the text encoders that ``source`` does not use, and of their tokenizers."""
    unused = [name for name in source.facts.family.text_encoders if name not in source.text_encoders]
    return [*unused, *(name.replace("text_encoder", "tokenizer") for name in unused)]
