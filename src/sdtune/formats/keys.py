"""Tensor names of a model: comparison with those in a file, and canonical names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdtune.errors import UserError
from sdtune.formats.lora import CLIP_ENCODERS, few
from sdtune.formats.original.clip import with_text_model
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
    return with_text_model(key) if component in CLIP_ENCODERS else key


def is_redundant(key: str) -> bool:
    """Whether ``key`` is not needed: position ids of older transformers, or the second name of T5's token table."""
    return key.endswith("embeddings.position_ids") or key == "encoder.embed_tokens.weight"
