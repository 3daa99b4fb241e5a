"""``sdtune caption``: write caption files next to images with a captioning or tagging model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge
from omegaconf import DictConfig
from PIL import Image

from sdtune.captioning.captioner import Captioner, CaptionSettings
from sdtune.captioning.models import check_model_name, is_tagger, locate_model
from sdtune.captioning.outputs import Outputs, caption_outputs, interruptible, print_summary, write_outputs
from sdtune.captioning.tagger import Tagger, TagSettings
from sdtune.commands.threads import choose_threads
from sdtune.config import hardware
from sdtune.config.schema import check_value
from sdtune.config.settings import plain
from sdtune.errors import UserError
from sdtune.files import write_text

_TYPES: dict[str, Any] = {
    "model": str,
    "prefix": str | None,
    "overwrite": bool,
    "batch_size": Annotated[int, Ge(1)],
    **get_type_hints(CaptionSettings, include_extras=True),
    **get_type_hints(TagSettings, include_extras=True),
}


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` without loading weights, and return the function that writes the captions."""
    options = plain(config, ("data", "hardware"))
    hardware.check_hardware(options["hardware"])
    check_value(options["data"]["path"], str, "data.path")
    for key, hint in _TYPES.items():
        check_value(options[key], hint, key)
    outputs = caption_outputs(options["data"]["path"], options["overwrite"])
    check_model_name(options["model"], "caption")

    def start(composed: DictConfig) -> None:
        with interruptible(outputs.kind), choose_threads(options["hardware"]):
            _write(options, outputs)

    return start


def _write(options: Mapping[str, Any], outputs: Outputs) -> None:
    prefix = options["prefix"]

    def write(target: Path, caption: str) -> None:
        write_text(target, f"{prefix} {caption}" if prefix else caption)

    unreadable = []
    if outputs.missing:
        unreadable = write_outputs(outputs, options["batch_size"], _captioner(options), write)
    print_summary(outputs, unreadable)


def _captioner(options: Mapping[str, Any]) -> Callable[[list[Image.Image]], Sequence[str]]:
    """The loaded model of the setting ``model``."""
    folder = locate_model(options["model"], "caption")
    device = hardware.first_device(options["hardware"])
    if is_tagger(folder):
        _check_unused(options, CaptionSettings, "applies only to captioning models", "remove it for a tagger")
        return Tagger(folder, _settings(options, TagSettings), device)
    _check_unused(options, TagSettings, "applies only to taggers", "remove it for a captioning model")
    return Captioner(folder, _settings(options, CaptionSettings), device, str(options["hardware"]["precision"]))


def _settings(options: Mapping[str, Any], kind: type) -> Any:
    values = {key: options[key] for key in get_type_hints(kind)}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _check_unused(options: Mapping[str, Any], kind: type, message: str, remedy: str) -> None:
    """Raise UserError for a setting of ``kind`` that is not its default, since the model does not use it."""
    chosen, default = _settings(options, kind), kind()
    for key in get_type_hints(kind):
        if getattr(chosen, key) != getattr(default, key):
            raise UserError(message, key=key, remedy=remedy)
