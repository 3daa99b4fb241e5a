"""Batched LoRA layers: one denoiser with the LoRA pairs of several runs, whose samples are concatenated in the batch.

The base layer is computed once for all runs. The pairs of all runs are two batched matrix products per layer, with
smaller ranks padded with zeros. Used for language models by mLoRA (Ye et al. 2023) and LoRAFusion (Zhu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.backbone.quantization import Quantized
from sdtune.shared_backbone.padding import LoRALinear, PaddedPairs


class CurrentBatch:
    """LoRA pairs of the runs in the current batch, by layer name; layers without any pair are absent."""

    def __init__(self) -> None:
        self.stacks: Mapping[str, PaddedPairs] = {}


class BatchedLoRALayer(nn.Module):
    """Frozen layer with one LoRA pair per run; the batch consists of equally sized parts, one after another per run.

    Args:
        base: linear layer or convolution.
        name: name of the layer in the denoiser.
        present: pairs of the current batch.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, name: str, present: CurrentBatch) -> None:
        super().__init__()
        self.base = base
        self._name, self._present = name, present

    def forward(self, x: Tensor) -> Tensor:
        stack = self._present.stacks.get(self._name)
        if stack is None:
            out: Tensor = self.base(x)
            return out
        downs, ups, _ = stack
        lora_input = self._with_dropout(x, stack)
        is_plain = isinstance(self.base, nn.Linear) and not isinstance(self.base, Quantized)
        if (
            is_plain
            and lora_input is x
            and (torch.is_autocast_enabled(x.device.type) or self.base.weight.dtype == downs.dtype)
        ):
            fused: Tensor = LoRALinear.apply(x, self.base.weight, self.base.bias, downs, ups)  # type: ignore[no-untyped-call]
            return fused
        out, lora_input = self.base(x), lora_input.to(downs.dtype)
        if isinstance(self.base, nn.Conv2d):
            return out + _lora_convolution(self.base, lora_input, downs, ups).to(out.dtype)
        low = torch.bmm(lora_input.reshape(len(downs), -1, lora_input.shape[-1]), downs.transpose(1, 2))
        return out + torch.bmm(low, ups).reshape(out.shape).to(out.dtype)

    def _with_dropout(self, x: Tensor, stack: PaddedPairs) -> Tensor:
        if stack.dropouts is None:
            return x
        parts = x.chunk(len(stack.dropouts))
        return torch.cat([_dropout(part, *settings) for part, settings in zip(parts, stack.dropouts, strict=True)])


def _dropout(x: Tensor, probability: float, seed: int) -> Tensor:
    """Dropout whose mask depends only on ``seed``: not on other runs, and equal when activations are recomputed."""
    if probability == 0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    return x * torch.empty_like(x).bernoulli_(1 - probability, generator=generator).div_(1 - probability)


def _lora_convolution(base: nn.Conv2d, x: Tensor, downs: Tensor, ups: Tensor) -> Tensor:
    """LoRA output of a convolution as grouped convolutions, with the runs concatenated along the channels."""
    count, rank = downs.shape[:2]
    stacked = torch.cat(x.chunk(count), dim=1)
    kernels = downs.reshape(count * rank, base.in_channels, *base.kernel_size)
    low = F.conv2d(stacked, kernels, None, base.stride, base.padding, base.dilation, groups=count)
    high = ups.transpose(1, 2).reshape(count * base.out_channels, rank, 1, 1)
    return torch.cat(F.conv2d(low, high, groups=count).chunk(count, dim=1))
