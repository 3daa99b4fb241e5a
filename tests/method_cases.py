"""Every method of ``conf/method``, with settings and data with which it can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from running import adamw, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.config.targets import resolve
from sdtune.data.control.edges import Canny
from sdtune.errors import UserError
from sdtune.paths import config_folder

METHODS = sorted(path.stem for path in (config_folder() / "method").glob("*.yaml"))

WORD = NewToken("<new>", "a word")

NEEDED: tuple[tuple[dict[str, Any], Sequence[str]], ...] = (
    ({}, ()),
    ({"control": Canny()}, ("data/control=canny",)),
    ({"class_prompt": "a dog", "class_images": 2}, ("data.class_prompt=a dog", "data.class_images=2")),
)
"""Data settings that a method may require, with the corresponding overrides."""


@dataclass(frozen=True)
class Case:
    """A method with settings, and the data that it requires."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = (v if isinstance(v, str) else "+".join(v) for v in self.settings.values())
        return "-".join([self.name, *values])

    @property
    def kind(self) -> Any:
        node = yaml.safe_load((config_folder() / "method" / f"{self.name}.yaml").read_text(encoding="utf-8"))
        return resolve(node["_target_"], "method")

    def model(self, folder: Path, lr: float = 1e-2, **more: Any) -> Any:
        words = {"new_tokens": [WORD]} if self.kind.trains_only_new_tokens else {}
        return self.kind(backbone=Pretrained(str(folder)), optimizer=adamw(lr), **self.settings, **words, **more)

    def data(self, folder: Path, images: Path, **more: Any) -> Any:
        """Data for the first settings of :data:`NEEDED` that the method accepts; prompts have its new token."""
        return self._accepted_data(folder, images, **more)[0]

    def command(self, folder: Path, images: Path) -> list[str]:
        """Overrides of ``sdtune train`` for the same model and data."""
        command_overrides = [f"method={self.name}"]
        if self.kind.trains_only_new_tokens:
            command_overrides += ['new_tokens=[{token: "<new>", init: "a word"}]', "data.templates=['<new> {}']"]
        return [*command_overrides, *self._accepted_data(folder, images)[1]]

    def _accepted_data(self, folder: Path, images: Path, **more: Any) -> tuple[Any, Sequence[str]]:
        words = {"templates": ["<new> {}"]} if self.kind.trains_only_new_tokens else {}
        model = self.model(folder)
        for data_settings, overrides in NEEDED:
            data = folder_data(images, **{**data_settings, **words, **more})
            try:
                model.check_data(data)
            except UserError:
                continue
            return data, overrides
        raise AssertionError(f"{self.name} accepts no data of NEEDED")


MORE = [
    Case("lora", {"targets": ["cross_attention", "self_attention", "feed_forward", "convolutions", "text_encoder"]}),
    Case("full", {"parts": ["denoiser", "text_encoder", "vae"]}),
    Case("dreambooth", {"parts": ["denoiser", "text_encoder"]}),
    Case("controlnet", {"denoiser": "decoder"}),
    Case("controlnet", {"denoiser": "all"}),
]
MORE_OF_SD3 = [
    Case("lora", {"targets": ["joint_attention", "feed_forward", "text_encoder"]}),
    Case("full", {"parts": ["denoiser", "text_encoder", "vae"]}),
    Case("dreambooth", {"parts": ["denoiser", "text_encoder"]}),
    Case("controlnet", {"denoiser": "all"}),
]
