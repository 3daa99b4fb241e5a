"""Modules beside a denoiser that add to its inputs, such as ControlNets (Zhang et al. 2023, section 3.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sdtune.backbone.families.base import Facts
from sdtune.backbone.foreign import unreadable_as_user_error
from sdtune.errors import UserError
from sdtune.files import read_json
from sdtune.formats.files import read_keys
from sdtune.formats.pipeline import weights_name

ConditionEncoder = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Function from conditions by name, float32 [B, 3, H, W] in [0, 1], to what modules beside a denoiser read."""

AddedInputs = dict[str, Any]
"""Arguments of a denoiser that modules beside it compute, such as the residuals of ControlNets: tensors, or tuples or
mappings of them.
"""


CONTROLNET_WEIGHTS = weights_name("controlnet")
"""Name of the weights file in a ControlNet folder of diffusers."""


class Conditioner(Protocol):
    """A module beside a denoiser: it computes additional inputs of the denoiser from one condition of a request."""

    @property
    def name(self) -> str:
        """Name of the condition, such as ``control``."""

    def encode(self, backbone: Any, condition: Tensor) -> Tensor:
        """What :meth:`added_inputs` reads of a condition, such as control maps, float32 [B, 3, H, W] in [0, 1].

        It is computed once for each image, not in each step.
        """

    def added_inputs(
        self, backbone: Any, noisy: Tensor, timesteps: Tensor, arguments: Mapping[str, Any], condition: Tensor
    ) -> AddedInputs:
        """Additional inputs of the denoiser.

        Args:
            backbone: the backbone that predicts.
            noisy: noisy latents [B, C, h, w].
            timesteps: [B] or without dimensions.
            arguments: those of :meth:`sdtune.backbone.backbone.Backbone.conditioning_arguments`.
            condition: the output of :meth:`encode`.
        """


class ControlNetKind(ABC):
    """How the ControlNets of a model family are found, copied, read and called."""

    model_class: type[Any]
    """Class in diffusers."""

    marker_keys: tuple[str, ...]
    """Tensor names that identify a single file with a ControlNet; one of them is enough."""

    compared_fields: tuple[str, ...]
    """Fields of the config that are the same in a ControlNet and its denoiser."""

    encodes_maps: bool = False
    """Whether :meth:`encode` computes something."""

    decoder: tuple[str, ...] = ()
    """Prefixes of the parameter names in the denoiser's decoder; empty if the denoiser has no decoder."""

    def is_in(self, keys: Collection[str]) -> bool:
        """Whether a file with these tensor names contains a ControlNet."""
        return any(key in keys for key in self.marker_keys)

    def find(self, path: str, key: str, denoiser: Mapping[str, Any], facts: Facts) -> Path:
        """Check the ControlNet at ``path`` and return its local path; reads only configs and headers.

        Args:
            path: a folder in the diffusers layout, or a ``.safetensors`` file.
            key: config key of ``path``, for error messages.
            denoiser: config of the backbone's denoiser.
            facts: properties of the backbone.

        Raises:
            UserError: ``path`` is not a ControlNet, or it belongs to another backbone.
        """
        local_path = Path(path).expanduser()
        if local_path.is_file():
            if not self.is_in(read_keys(local_path)):
                raise UserError(
                    f"{path} is not a ControlNet of {facts.family.title}",
                    key=key,
                    remedy="use the folder or .safetensors file of a ControlNet for this backbone",
                )
            return local_path  # its tensor shapes are checked when it is loaded
        config = self._folder_config(local_path, key)
        self.check_config(path, key, config, facts)
        for name in self.compared_fields:
            if config.get(name) != denoiser.get(name):
                raise UserError(
                    f"{path} has {name} {config.get(name)}, the backbone's denoiser has {denoiser.get(name)}",
                    key=key,
                    remedy="use a ControlNet for this backbone",
                )
        return local_path

    def _folder_config(self, folder: Path, key: str) -> dict[str, Any]:
        file, expected = folder / "config.json", self.model_class.__name__
        if not file.is_file() or not (folder / CONTROLNET_WEIGHTS).is_file():
            raise UserError(
                f"{folder} is neither a folder with config.json and {CONTROLNET_WEIGHTS} nor a .safetensors file",
                key=key,
                remedy="set a ControlNet here (use adapters= for a LoRA)",
            )
        config = read_json(file, key)
        if config.get("_class_name") != expected:
            raise UserError(
                f"{folder} is a {config.get('_class_name')}, not the {expected} that this backbone needs",
                key=key,
                remedy="use a ControlNet for this backbone",
            )
        return config

    @abstractmethod
    def check_config(self, path: str, key: str, config: Mapping[str, Any], facts: Facts) -> None:
        """Raise UserError if ``config``, that of the ControlNet folder ``path``, is not supported."""

    def load(self, path: Path, key: str, backbone: Any) -> Any:
        """Load the ControlNet at ``path`` for ``backbone``, in float32.

        Raises:
            UserError: the files are damaged, or the tensors of a single file do not match the architecture.
        """
        if path.is_file():
            return self.load_file(path, key, backbone)
        with unreadable_as_user_error(path, key):
            return self.model_class.from_pretrained(
                path, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
            )

    @abstractmethod
    def load_file(self, file: Path, key: str, backbone: Any) -> Any:
        """As :meth:`load`, for a single file."""

    @abstractmethod
    def copy_of(self, backbone: Any, layers: int | None) -> Any:
        """A ControlNet with the weights of the backbone's denoiser; see :class:`sdtune.methods.ControlNet`."""

    @abstractmethod
    def fresh_layers(self, controlnet: Any) -> list[tuple[str, Any]]:
        """Layers of a copy with random initial values, which are not copied, and names for their random numbers."""

    @abstractmethod
    def check_layers(self, layers: int | None, denoiser: Mapping[str, Any]) -> None:
        """Raise UserError if a ControlNet cannot copy ``layers`` blocks of a denoiser with this config."""

    @abstractmethod
    def frozen_prefixes(self, controlnet: Any) -> tuple[str, ...]:
        """Prefixes of the names of parameters that do not change the output; they are not trained."""

    def encode(self, backbone: Any, maps: Tensor) -> Tensor:
        """What :meth:`residuals` reads of control maps; the maps themselves by default.

        Args:
            maps: float32 [B, 3, H, W] in [0, 1], at the size of the image.
        """
        return maps

    @abstractmethod
    def residuals(
        self,
        backbone: Any,
        model: Any,
        noisy: Tensor,
        timesteps: Tensor,
        arguments: Mapping[str, Any],
        encoded: Tensor,
        strength: float = 1.0,
    ) -> AddedInputs:
        """Residuals of one ControlNet for control maps, which :meth:`encode` has encoded."""

    @abstractmethod
    def names_in_file(self, tensors: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """Names of ``tensors`` in a single file for other programs."""


@dataclass(frozen=True)
class ControlNetWithStrength:
    """A ControlNet for sampling, with its strength; a :class:`Conditioner`."""

    name: str
    model: Any
    strength: float

    def encode(self, backbone: Any, condition: Tensor) -> Tensor:
        kind: ControlNetKind = backbone.controlnets
        return kind.encode(backbone, condition)

    def added_inputs(
        self, backbone: Any, noisy: Tensor, timesteps: Tensor, arguments: Mapping[str, Any], condition: Tensor
    ) -> AddedInputs:
        kind: ControlNetKind = backbone.controlnets
        return kind.residuals(backbone, self.model, noisy, timesteps, arguments, condition, self.strength)


def sum_of(first: AddedInputs, second: AddedInputs) -> AddedInputs:
    """Inputs that two modules add; where both add the same input, the sum."""
    return {**first, **{name: _sum(first[name], value) if name in first else value for name, value in second.items()}}


def with_added(arguments: Mapping[str, Any], added: AddedInputs) -> dict[str, Any]:
    """Arguments of a denoiser with the inputs that modules beside it add; mappings of the same name are joined."""
    joined = {
        name: {**arguments[name], **value}
        for name, value in added.items()
        if isinstance(value, Mapping) and name in arguments
    }
    return {**arguments, **added, **joined}


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        return sum_of(dict(first), dict(second))
    if isinstance(first, Tensor):
        return first + second
    return tuple(a + b for a, b in zip(first, second, strict=True))


def cast_conditions(conditions: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast ``conditions`` to ``dtype``, except the sizes in pixels, which half precision would round."""
    return {name: value if name == "time_ids" else _cast(value, dtype) for name, value in conditions.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return cast_conditions(value, dtype)
    if isinstance(value, Tensor):
        return value.to(dtype)
    return tuple(part.to(dtype) for part in value)
