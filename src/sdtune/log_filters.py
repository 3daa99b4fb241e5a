"""Filters for library warnings that a user of sdtune cannot act on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Warnings about intended behavior of sdtune.
_EXPECTED = (
    r".*LeafSpec.*deprecated.*",
    r".*Total length of .* across ranks is zero.*",  # no held-out images, hence no validation
    r".*module\(s\) in eval mode at the start of training.*",  # frozen modules
    r".*your dataloader is not resumable.*",  # the sampler starts at the resumed step; see data/order.py
    r".*does not have many workers.*",
    r".*The `srun` command is available.*",
    r".*requires torchvision.*",
)


def quiet() -> None:
    """Install the filters; call it before the libraries are imported. ``SDTUNE_VERBOSE=1`` disables them."""
    if os.environ.get("SDTUNE_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")  # Lightning's tips
    # peft imports bitsandbytes if installed, which then warns about missing kernels for 4-bit layers on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def restored_libraries() -> Iterator[None]:
    """Context manager that restores the log levels of libraries and the progress bars of transformers."""
    from transformers.utils import logging as transformers_logging

    names = [name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    loggers = [logging.getLogger(name) for name in {*names, *_SET_BY_COMMANDS}]
    settings = [(logger, logger.level, logger.handlers[:], logger.propagate, logger.disabled) for logger in loggers]
    has_bars = transformers_logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        for logger, level, handlers, propagate, disabled in settings:
            logger.setLevel(level)
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled
        if has_bars:
            transformers_logging.enable_progress_bar()


_SET_BY_COMMANDS = ("bitsandbytes", "pytorch_lightning", "lightning_fabric")


def quiet_libraries() -> None:
    """Set log levels after the imports: Lightning sets its level on import; transformers shows a bar for each file."""
    if os.environ.get("SDTUNE_VERBOSE"):
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
