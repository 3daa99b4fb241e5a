"""The ways to fine-tune, each a LightningModule over one backbone."""

from sdtune.methods.controlnet import ControlNet
from sdtune.methods.full import Full
from sdtune.methods.lora import LoRA

__all__ = ["ControlNet", "Full", "LoRA"]
