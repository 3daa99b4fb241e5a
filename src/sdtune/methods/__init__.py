"""The ways to fine-tune, each a LightningModule over one backbone."""

from sdtune.methods.full import Full
from sdtune.methods.lora import LoRA

__all__ = ["Full", "LoRA"]
