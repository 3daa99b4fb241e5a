"""Tensor names of a model: comparison with those in a file, and canonical names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdtune.errors import UserError
from sdtune.formats.lora import few
from sdtune.formats.original.names import modern_vae_key


def check_keys(
    where: str,
    found: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Sequence[int]],
    remedy: str = "use the model that belongs to the config",
) -> None:
    """Raise UserError, starting with ``where``, for missing or surplus tensors and for wrong shapes."""
    problems: list[str] = []
    if missing := wanted.keys() - found.keys():
        problems.append(f"lacks {few(missing, 1)}")
    if surplus := found.keys() - wanted.keys():
        problems.append(f"contains {few(surplus, 1)}, which the model does not have")
    misshaped = {
        f"{key} {list(found[key])} instead of {list(wanted[key])}"
        for key in wanted.keys() & found.keys()
        if list(found[key]) != list(wanted[key])
    }
    if misshaped:
        problems.append(f"has {few(misshaped, 1)}")
    if problems:
        raise UserError(f"{where} {'; '.join(problems)}", remedy=remedy)


def canonical_key(component: str, key: str) -> str:
    """``key`` of ``component`` in current naming, independent of the release that wrote the file."""
    if component == "vae":
        return modern_vae_key(key)
    if component.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection.")):
        return f"text_model.{key}"
    return key


def is_buffer(key: str) -> bool:
    """Whether ``key`` is the buffer of position ids that older transformers saved with the weights."""
    return key.endswith("embeddings.position_ids")
