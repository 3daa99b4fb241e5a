"""The ways to fine-tune, each a LightningModule over one backbone."""

from sdtune.methods.controlnet import ControlNet
from sdtune.methods.dreambooth import DreamBooth
from sdtune.methods.full import Full
from sdtune.methods.lora import LoRA
from sdtune.methods.textual_inversion import TextualInversion

__all__ = ["ControlNet", "DreamBooth", "Full", "LoRA", "TextualInversion"]
