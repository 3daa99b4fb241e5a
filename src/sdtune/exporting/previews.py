"""Sample images of a run in its exports: a gallery of the model card, and a thumbnail in the header of a file."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

from huggingface_hub import ModelCard
from PIL import Image

from sdtune.files import replacing, write_text
from sdtune.runs.layout import CARD

_MOST = 4
_SIDE = 256
_FOLDER = "samples"


def last_samples(run: Path) -> list[Path]:
    """Files of the last sample images of the run in the folder ``run``; empty without images after its start."""
    steps = sorted(path for path in (run / "samples").glob("step*[1-9]*") if path.is_dir())
    return sorted(steps[-1].glob("*.png")) if steps else []


def add_gallery(folder: Path, files: list[Path]) -> None:
    """Copy at most four images to ``folder`` and list them in its model card, where the Hugging Face Hub shows them."""
    card_file = folder / CARD
    if not files or not card_file.is_file():
        return
    card = ModelCard(card_file.read_text(encoding="utf-8"))
    widgets = []
    (folder / _FOLDER).mkdir(exist_ok=True)
    for number, file in enumerate(files[:_MOST]):
        name = f"{_FOLDER}/{number:03d}.png"
        with Image.open(file) as image:
            prompt = str(image.info.get("prompt", ""))
        with replacing(folder / name) as partial:
            shutil.copyfile(file, partial)
        widgets.append({"text": prompt, "output": {"url": name}})
    card.data["widget"] = widgets
    write_text(card_file, str(card))


def thumbnail(file: Path) -> str:
    """Data URI of a JPEG of at most 256 pixels, for ``modelspec.thumbnail`` (Stability-AI/ModelSpec 1.0.1)."""
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
