"""Every method with the settings and the data that it can be trained with, found by itself from ``conf/method``."""

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
"""What a method may need of its data, and the overrides that give it."""


@dataclass(frozen=True)
class Case:
    """A method with settings, and what its data needs."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = (v if isinstance(v, str) else "+".join(v) for v in self.settings.values())
        return "-".join([self.name, *values])

    @property
    def kind(self) -> Any:
        node = yaml.safe_load((config_folder() / "method" / f"{self.name}.yaml").read_text())
        return resolve(node["_target_"], "method")

    def model(self, folder: Path, lr: float = 1e-2, **more: Any) -> Any:
        words = {"new_tokens": [WORD]} if self.kind.needs_tokens else {}
        return self.kind(backbone=Pretrained(str(folder)), optimizer=adamw(lr), **self.settings, **words, **more)

    def data(self, folder: Path, images: Path, **more: Any) -> Any:
        """The first data of :data:`NEEDED` that the method accepts; its word, where it learns one, in every prompt."""
        return self._suitable(folder, images, **more)[0]

    def command(self, folder: Path, images: Path) -> list[str]:
        """Overrides of ``sdtune train`` for the same."""
        own = [f"method={self.name}"]
        if self.kind.needs_tokens:
            own += ['new_tokens=[{token: "<new>", init: "a word"}]', "data.templates=['<new> {}']"]
        return [*own, *self._suitable(folder, images)[1]]

    def _suitable(self, folder: Path, images: Path, **more: Any) -> tuple[Any, Sequence[str]]:
        words = {"templates": ["<new> {}"]} if self.kind.needs_tokens else {}
        model = self.model(folder)
        for needed, overrides in NEEDED:
            data = folder_data(images, **{**needed, **words, **more})
            try:
                model.check_data(data)
            except UserError:
                continue
            return data, overrides
        raise AssertionError(f"no data suits {self.name}")


MORE = [
    Case("lora", {"targets": ["cross_attention", "self_attention", "feed_forward", "convolutions", "text_encoder"]}),
    Case("full", {"parts": ["unet", "text_encoder", "vae"]}),
    Case("dreambooth", {"parts": ["unet", "text_encoder"]}),
    Case("controlnet", {"unet": "decoder"}),
    Case("controlnet", {"unet": "open"}),
]
