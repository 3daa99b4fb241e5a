"""Prompt templates for captions, as in Textual Inversion.

Gal et al. 2022, supplementary material: neutral texts adapted from CLIP's ImageNet templates, and similar ones for
styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sdtune.errors import UserError

TemplateSet = Literal["object", "style"]

_OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
_STYLE = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a good painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)


def templates(setting: TemplateSet | Sequence[str] | None) -> tuple[str, ...]:
    """Prompt templates of a predefined set or of a user's list; for None, the single template ``{}``.

    Raises:
        UserError: a template does not contain ``{}`` exactly once, or the list is empty.
    """
    if setting is None:
        return ("{}",)
    if isinstance(setting, str):
        return {"object": _OBJECT, "style": _STYLE}[setting]
    for template in setting:
        if template.count("{}") != 1:
            raise UserError(f"{template!r} must contain {{}} exactly once, for the caption", key="data.templates")
    if not setting:
        raise UserError(
            "the list is empty", key="data.templates", remedy="set object, style, or a list of texts with {}"
        )
    return tuple(setting)
