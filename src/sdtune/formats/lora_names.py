"""Names of LoRA tensors in files of other programs, translated to those of diffusers or kohya."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

BUNDLED = "bundle_emb."
"""Key prefix of the embeddings that OneTrainer saves in a LoRA file."""

_SUBSTITUTIONS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # peft: PeftModel.state_dict()
        (r"^base_model\.model\.", ""),
        (r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight"),
        # diffusers before 0.17: attention processors with layers of their own
        (r"\.processor\.to_([qkv])_lora\.(down|up)\.weight$", r".to_\1.lora.\2.weight"),
        (r"\.processor\.to_out_lora\.(down|up)\.weight$", r".to_out.0.lora.\1.weight"),
        # models of diffusers and transformers without the name of the component
        (r"^(?=(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.)", "unet."),
        (r"^(?=transformer_blocks\.)", "transformer."),
        (r"^(?=text_model\.)", "text_encoder."),
    )
)
_DOTTED = re.compile(r"lora_(unet|transformer|te[123]?)\.(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
"""OneTrainer's own names, with dots where kohya's names have underscores."""

_DIFFUSION_MODEL = re.compile(r"diffusion_model\.(.+)\.(?:lora_(A|B|down|up)\.weight|alpha)")
"""ai-toolkit's and ComfyUI's names: module paths of the original layout."""


def usual_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA ``tensors``, renamed to the names of diffusers or kohya; unknown names are not changed."""
    return {_usual_name(key): tensor for key, tensor in tensors.items()}


def _usual_name(key: str) -> str:
    if match := _DOTTED.fullmatch(key):
        return f"lora_{match[1]}_{match[2].replace('.', '_')}.{match[3]}"
    if match := _DIFFUSION_MODEL.fullmatch(key):
        part = {"A": "down", "B": "up"}.get(match[2], match[2])
        return f"lora_unet_{match[1].replace('.', '_')}.{f'lora_{part}.weight' if part else 'alpha'}"
    for pattern, replacement in _SUBSTITUTIONS:
        key = pattern.sub(replacement, key)
    return key


def without_bundled_embeddings(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """``tensors`` without OneTrainer's embeddings, and these embeddings: token -> name of the encoder -> vectors."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.startswith(BUNDLED)]:
        token, _, encoder = key.removeprefix(BUNDLED).rpartition(".string_to_param.*" if key.endswith("*") else ".")
        embeddings.setdefault(token, {})[encoder or "clip_l"] = tensors[key]
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLED)}, embeddings
