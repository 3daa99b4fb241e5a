"""8-bit floating-point tensors of other programs' checkpoints, as 16-bit tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdtune.errors import UserError

_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE, _INPUT_SCALE = ".scale_weight", ".scale_input"
_OTHER_SCALES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".weight_scale_inv")


def without_float8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with 8-bit ones converted: plain ones to float16, which is exact, scaled ones to bfloat16.

    In ComfyUI's scaled files, ``NAME.scale_weight`` is the factor of ``NAME.weight``; ``NAME.scale_input`` affects only
    the speed of its matrix products; ``scaled_fp8`` marks such a file.

    Raises:
        UserError: the scales are stored in another way; the message continues the file's name.
    """
    if unknown := next((key for key in tensors if key.endswith(_OTHER_SCALES)), None):
        raise UserError(
            f"has quantized weights in a format that sdtune does not read ({unknown})",
            remedy="use a file in fp16, bf16 or plain fp8",
        )
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith((_SCALE, _INPUT_SCALE)) or key.rpartition(".")[2] == "scaled_fp8":
            continue
        converted[key] = tensor.to(torch.float16) if tensor.dtype in _TYPES else tensor
    for key, scale in tensors.items():
        if not key.endswith(_SCALE):
            continue
        name = f"{key.removesuffix(_SCALE)}.weight"
        weight = tensors.get(name)
        if weight is None or weight.dtype not in _TYPES or scale.numel() != 1:
            raise UserError(
                f"has {key}, which is not the scale of an fp8 tensor {name}", remedy="use a file in fp16 or bf16"
            )
        # float16 is too narrow for the product: small values would lose precision.
        converted[name] = (weight.float() * scale.float()).to(torch.bfloat16)
    return converted
