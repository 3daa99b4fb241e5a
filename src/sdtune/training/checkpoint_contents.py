"""Contents of a checkpoint: trained weights only, and the backbone's hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.errors import UserError


def keep_only_trained(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Reduce the state dict of ``checkpoint`` to the tensors in ``names``."""
    checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in names}


def check_same_backbone(checkpoint_hash: str, source: Pretrained) -> None:
    """Check that a checkpoint was trained on ``source``.

    Args:
        checkpoint_hash: hash of the backbone in the checkpoint.

    Raises:
        UserError: the hash of ``source`` is different.
    """
    if checkpoint_hash != source.hash():
        raise UserError(
            f"the checkpoint was trained on another backbone ({checkpoint_hash[:12]}) than {source.path}"
            f" ({source.hash()[:12]})",
            key="resume",
            remedy="use the backbone that the checkpoint was trained on",
        )


def complete(checkpoint: dict[str, Any], names: Sequence[str], model: Mapping[str, Tensor]) -> None:
    """Add the frozen tensors of ``model`` to the state dict of ``checkpoint``, for a strict load.

    Args:
        names: names of the trained tensors.
        model: state dict of the model.

    Raises:
        UserError: the checkpoint has other tensors than ``names``.
    """
    mismatches = sorted(set(names) ^ set(checkpoint["state_dict"]))
    if mismatches:
        raise UserError(
            f"{len(mismatches)} trained tensors do not match those of the checkpoint, the first is {mismatches[0]}",
            key="resume",
            remedy="use the version of sdtune that started the run, or start a new run",
        )
    checkpoint["state_dict"] = {**model, **checkpoint["state_dict"]}
