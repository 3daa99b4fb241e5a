"""The five fine-tuning methods, as LightningModules, and their base class."""

from sdtune.methods.base import Adapter
from sdtune.methods.controlnet import ControlNet
from sdtune.methods.dreambooth import DreamBooth
from sdtune.methods.full import Full
from sdtune.methods.lora import LoRA
from sdtune.methods.textual_inversion import TextualInversion

__all__ = ["Adapter", "ControlNet", "DreamBooth", "Full", "LoRA", "TextualInversion"]
