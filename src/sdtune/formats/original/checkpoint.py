"""Split a single-file checkpoint into the models of a diffusers pipeline, and join them again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import UserError
from sdtune.formats.original.table import TensorEntry, from_original, original_names, to_original

Config = Mapping[str, Any]
Components = dict[str, dict[str, Tensor]]
"""Tensors of each component by diffusers or transformers name (CLIP text encoders: with ``text_model.`` prefix)."""


def _is_never_unused(key: str, config: Config) -> bool:
    return False


def _nothing(*_: object) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class ComponentLayout:
    """How a single file stores one component. All functions get the component's config.

    Attributes:
        prefix: prefix of the keys.
        entries: entries of the tensors with the given names in diffusers or transformers.
        usual_name: if files may contain the names of diffusers or transformers too, function from such a name, also one
            of an older release, to the current name. If None, keys that are in no entry keep their prefix.
        is_unused: whether files may contain a key (without prefix) that the model does not use.
        placeholders: tensors (without prefix) that other programs expect, from those in the original layout.
        implied: tensors by name that the file omits, because all models have the same values.
    """

    prefix: str
    entries: Callable[[Collection[str], Config], Sequence[TensorEntry]]
    usual_name: Callable[[str], str] | None = None
    is_unused: Callable[[str, Config], bool] = _is_never_unused
    placeholders: Callable[[Mapping[str, Tensor], Config], dict[str, Tensor]] = _nothing
    implied: Callable[[Config], dict[str, Tensor]] = _nothing

    def read(self, tensors: Mapping[str, Tensor], config: Config, names: Collection[str]) -> dict[str, Tensor]:
        """Tensors by diffusers or transformers name; unexpected ones keep their names.

        Args:
            tensors: tensors by key without prefix.
            config: config of the component.
            names: expected names.
        """
        entries = self.entries(names, config)
        originals = {entry.original for entry in entries}
        keys = [key for key in tensors if key in originals or not self.is_unused(key, config)]
        by_name = original_names(entries)
        found: dict[str, Tensor] = {}
        for key in keys:
            if key in originals or self.usual_name is None:
                found[key] = tensors[key]
            else:
                name = self.usual_name(key)
                found[by_name.get(name, name)] = tensors[key]
        converted = from_original(found, entries)
        if converted:
            dtype = next(iter(converted.values())).dtype
            converted |= {name: tensor.to(dtype) for name, tensor in self.implied(config).items()}
        kept_prefix = "" if self.usual_name is not None else self.prefix
        return converted | {f"{kept_prefix}{key}": found[key] for key in found.keys() - originals}

    def write(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Tensors by key with prefix, from all ``tensors`` of the component.

        Raises:
            UserError: a tensor that the file omits does not have the value that all models have.
        """
        implied = self.implied(config)
        for name in implied.keys() & tensors.keys():
            if not torch.equal(implied[name], tensors[name].detach().cpu().to(implied[name].dtype)):
                raise UserError(
                    f"{name} differs from the value that programs assume for a single file, which does not store it",
                    key="format",
                    remedy="set format=pipeline",
                )
        entries = self.entries([name for name in tensors if name not in implied], config)
        originals = to_original(tensors, entries)
        originals |= self.placeholders(originals, config)
        return {self.prefix + key: tensor for key, tensor in originals.items()}


@dataclass(frozen=True)
class FileLayout:
    """How a single file stores a model.

    Attributes:
        components: layout of each component; the first is the denoiser.
        optional: components that a file may lack.
        is_ignored: whether a key is not part of the model, such as noise schedules and optimizer states.
        has_markers: whether ComfyUI reads the markers ``v_pred`` and ``ztsnr``.
        predictions: prediction types in diffusers by their names in ModelSpec.
    """

    components: Mapping[str, ComponentLayout]
    optional: Collection[str]
    is_ignored: Callable[[str], bool]
    has_markers: bool
    predictions: Mapping[str, str]

    def stored(self, keys: Collection[str]) -> list[str]:
        """Components of a file with these tensor names; required ones are included even if they are missing."""
        return [
            name
            for name, component in self.components.items()
            if name not in self.optional or any(key.startswith(component.prefix) for key in keys)
        ]


def split(
    tensors: Mapping[str, Tensor],
    layout: FileLayout,
    configs: Mapping[str, Config],
    names: Mapping[str, Collection[str]],
) -> Components:
    """Split the ``tensors`` of a single file into components and rename them; omit tensors that training does not need.

    Unexpected tensors are kept, so that the caller can report them: those with a component's prefix in this component,
    all others with their original names in the denoiser.

    Args:
        tensors: tensors by original name.
        layout: layout of the file.
        configs: config of each component.
        names: expected names of each component.
    """
    remaining = {key: tensor for key, tensor in tensors.items() if not layout.is_ignored(key)}
    components: Components = {}
    for name, component in layout.components.items():
        keys = [key for key in remaining if key.startswith(component.prefix)]
        prefixed = {key.removeprefix(component.prefix): remaining.pop(key) for key in keys}
        components[name] = component.read(prefixed, configs[name], names[name])
    components[next(iter(layout.components))] |= remaining
    return components


def join(
    components: Components,
    layout: FileLayout,
    configs: Mapping[str, Config],
    v_prediction: bool = False,
    zero_snr: bool = False,
) -> dict[str, Tensor]:
    """Join all models to one dict of tensors by original name, as in the authors' files.

    Args:
        components: all tensors of each model.
        layout: layout of the file.
        configs: config of each component.
        v_prediction: add the marker ``v_pred`` if the layout has markers. ComfyUI reads it from SDXL files; it detects
            the prediction type of SD 2.x from the weights, and assumes epsilon for SD 1.x.
        zero_snr: add the marker ``ztsnr`` for zero terminal SNR if the layout has markers.

    Raises:
        UserError: a model has values that the layout cannot store.
    """
    joined: dict[str, Tensor] = {}
    for name, component in layout.components.items():
        if name in components:
            joined |= component.write(components[name], configs[name])
    markers = (("v_pred", v_prediction), ("ztsnr", zero_snr)) if layout.has_markers else ()
    return joined | {marker: torch.tensor([]) for marker, is_set in markers if is_set}


def stated_prediction(
    tensors: Collection[str], metadata: Mapping[str, str], predictions: Mapping[str, str]
) -> str | None:
    """Prediction type that a checkpoint states: by ComfyUI's marker ``v_pred``, or else by ModelSpec's metadata.

    The marker counts more: kohya's scripts for merging write "epsilon" also for v-prediction models.

    Args:
        tensors: tensor names.
        metadata: header of the file; https://github.com/Stability-AI/ModelSpec.
        predictions: supported prediction types by their names in ModelSpec.

    Raises:
        UserError: it is an EDM or flow model; the message continues the file's name.
    """
    edm = next((key for key in ("edm_mean", "edm_std", "edm_vpred.sigma_max") if key in tensors), None)
    if edm is not None:
        raise UserError(
            f"is an EDM model (it has {edm}), whose noise sdtune does not train with",
            remedy="use a model with a DDPM noise schedule",
        )
    name = metadata.get("modelspec.prediction_type")
    if name is not None and name not in predictions:
        raise UserError(
            f"states modelspec.prediction_type {name}", remedy=f"sdtune trains models with {' or '.join(predictions)}"
        )
    return "v_prediction" if "v_pred" in tensors else predictions.get(name or "")
