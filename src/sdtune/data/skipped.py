"""``skipped.csv``: the damaged images that a training leaves out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from sdtune.data.table import StoredImage
from sdtune.files import write_text


def write_skipped(folder: Path, images: Sequence[StoredImage]) -> None:
    """Write ``folder/skipped.csv`` with the place and the problem of each image; without images, remove it."""
    file = folder / "skipped.csv"
    if not images:
        file.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "problem"])
    writer.writerows([str(image.place), image.problem] for image in images)
    write_text(file, text.getvalue())
