"""Files that a command writes next to the images of a folder: which are missing, and the loop that writes them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from PIL import Image

from sdtune.data.folder import CAPTION_SUFFIXES, images_of, mask_path
from sdtune.data.listing import list_files
from sdtune.errors import RunFailed, Stopped, UserError
from sdtune.hardware.signals import STOP_SIGNALS, handled
from sdtune.images.files import open_image
from sdtune.progress import bar

_Result = TypeVar("_Result")

_KEY = "data.path"
_DECODING_THREADS = 4


@dataclass(frozen=True)
class Outputs:
    """Output files of the images of a folder.

    Attributes:
        kind: what each file contains: ``caption`` or ``mask``.
        folder: the folder of the images.
        missing: image -> the file to write.
        existing: number of images that have a file and are skipped.
    """

    kind: str
    folder: Path
    missing: dict[Path, Path]
    existing: int


def caption_outputs(path: str, overwrite: bool) -> Outputs:
    """Caption files of the images in and below ``path``; with ``overwrite``, also those that exist.

    A new file is ``image.txt``; with ``overwrite``, an existing ``image.caption`` is replaced under its own name,
    because an image must not have both.

    Raises:
        UserError: there are no images, a folder cannot be read or written, or two images would have the same file.
    """
    folder, files, images = _listed(path)
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() in CAPTION_SUFFIXES}
    targets = {image: captions.get(image.with_suffix(""), image.with_suffix(".txt")) for image in images}
    return _outputs("caption", folder, targets, files, overwrite)


def mask_outputs(path: str, overwrite: bool) -> Outputs:
    """Mask files of the images in and below ``path``; with ``overwrite``, also those that exist.

    Raises:
        UserError: as :func:`caption_outputs`.
    """
    folder, files, images = _listed(path)
    return _outputs("mask", folder, {image: mask_path(image) for image in images}, files, overwrite)


def _listed(path: str) -> tuple[Path, Sequence[Path], Sequence[Path]]:
    """The folder, all files in it, and its images."""
    folder = Path(path).expanduser().absolute()
    listing = list_files(folder, _KEY, {})
    return folder, listing.files, images_of(listing, folder, _KEY)


def _outputs(kind: str, folder: Path, targets: dict[Path, Path], files: Sequence[Path], overwrite: bool) -> Outputs:
    present = set() if overwrite else set(files)
    missing = {image: target for image, target in targets.items() if target not in present}
    for parent in dict.fromkeys(target.parent for target in missing.values()):
        if not os.access(parent, os.W_OK):
            raise UserError(f"{parent} is not writable", key=_KEY, remedy="make it writable, or copy the images")
    owners: dict[Path, Path] = {}
    for image, target in missing.items():
        other = owners.setdefault(target, image)
        if other != image:
            raise UserError(
                f"{other} and {image.name} would have the same {kind} file, {target.name}",
                key=_KEY,
                remedy="rename one of the images",
            )
    return Outputs(kind, folder, missing, len(targets) - len(missing))


def write_outputs(
    outputs: Outputs,
    batch_size: int,
    compute: Callable[[list[Image.Image]], Sequence[_Result]],
    write: Callable[[Path, _Result], None],
) -> list[str]:
    """Compute and write the missing files, batch by batch; images that cannot be read are left out.

    Args:
        compute: returns one result per image; the images are upright and in mode RGB.
        write: writes a result to a file atomically.

    Returns:
        One line for each image that cannot be read.
    """
    unreadable: list[str] = []
    pairs = list(outputs.missing.items())
    with ThreadPoolExecutor(_DECODING_THREADS) as pool, bar(f"Writing {outputs.kind}s", len(pairs)) as advance:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            opened = list(pool.map(_opened, [image for image, _ in batch]))
            unreadable += [image for image in opened if isinstance(image, str)]
            readable = {
                target: image for (_, target), image in zip(batch, opened, strict=True) if not isinstance(image, str)
            }
            results = compute(list(readable.values())) if readable else ()
            for target, result in zip(readable, results, strict=True):
                write(target, result)
            advance(len(batch))
    return unreadable


def _opened(path: Path) -> Image.Image | str:
    """The decoded image; if it cannot be read, the reason."""
    try:
        return open_image(path)
    except UserError as error:
        return error.message


def print_summary(outputs: Outputs, unreadable: Sequence[str]) -> None:
    """Print how many files were written, how many images were skipped, and a line for each unreadable image.

    Raises:
        RunFailed: images could not be read, so they have no file.
    """
    kind, written = outputs.kind, len(outputs.missing) - len(unreadable)
    print(f"{written} {kind}{'' if written == 1 else 's'} written in {outputs.folder}")
    if outputs.existing:
        images = "1 image that already has" if outputs.existing == 1 else f"{outputs.existing} images that already have"
        print(f"skipped {images} a {kind}; overwrite=true replaces them")
    for line in unreadable:
        print(line, file=sys.stderr)
    if unreadable:
        raise RunFailed(
            f"images without a {kind}, because they cannot be read: {len(unreadable)} of"
            f" {len(outputs.missing) + outputs.existing}; repair or remove them, and run the same command again"
        )


@contextmanager
def interruptible(kind: str) -> Iterator[None]:
    """Context manager in which a stop signal raises :class:`Stopped`; the files written so far remain."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name}; the same command continues with the images without a {kind}", 128 + number)

    with handled(STOP_SIGNALS, stop):
        yield
