"""Tensor names of a model, compared with those in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdtune.errors import UserError
from sdtune.formats.lora import few
from sdtune.formats.original.names import modern_vae_key


def check_keys(where: str, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """UserError naming the first few tensors that are missing, surplus or misshaped; ``where`` begins the message."""
    wrong: list[str] = []
    if missing := wanted.keys() - found.keys():
        wrong.append(f"lacks {few(missing)}")
    if surplus := found.keys() - wanted.keys():
        wrong.append(f"holds {few(surplus)}, which the model does not have")
    odd = {
        f"{key} {list(found[key])} instead of {list(wanted[key])}"
        for key in wanted.keys() & found.keys()
        if list(found[key]) != list(wanted[key])
    }
    if odd:
        wrong.append(f"has {few(odd)}")
    if wrong:
        raise UserError(f"{where} {'; '.join(wrong)}; is it the model that its config says?")


def canonical_key(component: str, key: str) -> str:
    """``key`` of ``component`` as files of today have it: the same for every release that may have written it."""
    if component == "vae":
        return modern_vae_key(key)
    if component.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection.")):
        return f"text_model.{key}"
    return key


def is_buffer(key: str) -> bool:
    """Whether ``key`` is what older transformers saved beside the weights: a plain count of positions."""
    return key.endswith("embeddings.position_ids")
