"""Where the bytes of an image are: a file of its own, or a part of an uncompressed archive."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Place(NamedTuple):
    """Bytes of a file.

    Args:
        file: absolute path.
        offset: first byte.
        length: number of bytes; None: to the end of the file.
    """

    file: Path
    offset: int = 0
    length: int | None = None

    @property
    def is_part(self) -> bool:
        """Whether the bytes are a part of a larger file."""
        return self.length is not None

    def __str__(self) -> str:
        return f"{self.file} at byte {self.offset:,}" if self.is_part else str(self.file)

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file cannot be read, or is too short.
        """
        if self.length is None:
            return self.file.read_bytes()
        descriptor = os.open(self.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            os.lseek(descriptor, self.offset, os.SEEK_SET)
            content = b""
            while len(content) < self.length and (block := os.read(descriptor, self.length - len(content))):
                content += block
        finally:
            os.close(descriptor)
        if len(content) < self.length:
            raise OSError(f"the file ends after {len(content)} of {self.length} bytes")
        return content

    def open(self) -> Path | BinaryIO:
        """What Pillow opens: the path of a whole file, or the bytes in memory."""
        return io.BytesIO(self.read()) if self.is_part else self.file


def as_place(image: Path | Place) -> Place:
    return image if isinstance(image, Place) else Place(image)
