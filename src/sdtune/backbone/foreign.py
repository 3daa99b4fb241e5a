"""Errors of diffusers and transformers for files that are not what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtune.errors import UserError
from sdtune.hardware.out_of_memory import is_out_of_memory


@contextmanager
def unreadable_as_user_error(place: Path, key: str) -> Iterator[None]:
    """Context manager for one call of a library that builds an object from the files at ``place``.

    For a damaged config, diffusers, transformers and tokenizers raise nearly every kind of exception: TypeError,
    KeyError, ZeroDivisionError, AttributeError, and tokenizers a plain Exception.

    Args:
        place: file or folder, for the message.
        key: its config key.

    Raises:
        UserError: for every exception except out of memory.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{place} cannot be read ({type(error).__name__}: {reason})",
            key=key,
            remedy="copy or download it again",
        ) from error
