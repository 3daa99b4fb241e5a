"""Contents of a checkpoint: trained weights only, and the backbone's hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.errors import UserError


def only_trained(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Leave the tensors called ``names`` alone in ``checkpoint``."""
    checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in names}


def check_same_backbone(theirs: str, source: Pretrained) -> None:
    """UserError for a checkpoint of other weights than ``source``'s; ``theirs`` is the hash that it holds."""
    if theirs != source.hash():
        raise UserError(
            f"the checkpoint was trained on another backbone ({theirs[:12]}) than {source.path} ({source.hash()[:12]})",
            key="resume",
            remedy="name the one that it was trained on",
        )


def complete(checkpoint: dict[str, Any], names: Sequence[str], model: Mapping[str, Tensor]) -> None:
    """Put the frozen tensors of ``model`` beside the checkpoint's; UserError where it holds others than ``names``.

    A strict load wants every tensor, and the names have just been compared.
    """
    odd = sorted(set(names) ^ set(checkpoint["state_dict"]))
    if odd:
        raise UserError(f"{len(odd)} trained tensors do not match the checkpoint's, first {odd[0]}", key="resume")
    checkpoint["state_dict"] = {**model, **checkpoint["state_dict"]}
