"""Convert the errors of diffusers, transformers and tokenizers for damaged files to UserError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtune.errors import UserError
from sdtune.hardware.out_of_memory import is_out_of_memory


@contextmanager
def unreadable_as_user_error(path: Path, key: str) -> Iterator[None]:
    """Context manager that converts a library's exceptions while it builds an object from the files at ``path``.

    For a damaged config, diffusers, transformers and tokenizers raise nearly every kind of exception: TypeError,
    KeyError, ZeroDivisionError, AttributeError, and tokenizers a plain Exception.

    Args:
        path: file or folder, for the message.
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
            f"{path} cannot be read ({type(error).__name__}: {reason})",
            key=key,
            remedy="copy or download it again",
        ) from error
