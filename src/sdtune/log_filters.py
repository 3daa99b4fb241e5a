"""Filters for the libraries' warnings that a user of sdtune can do nothing about."""

from __future__ import annotations

import logging
import os
import warnings

# Each of these is about something that sdtune does on purpose.
_EXPECTED = (
    r".*LeafSpec.*deprecated.*",
    r".*Total length of .* across ranks is zero.*",  # no held-out images, so no validation
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen parts
    r".*your dataloader is not resumable.*",  # the sampler starts at the step; see data/order.py
    r".*does not have many workers.*",
    r".*The `srun` command is available.*",
    r".*requires torchvision.*",
)


def quiet() -> None:
    """Before the libraries are imported; ``SDTUNE_VERBOSE=1`` leaves everything as it is."""
    if os.environ.get("SDTUNE_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")  # Lightning's tips
    # peft imports it where it is installed, and it then misses kernels that only a CPU's 4-bit layers need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)


def quiet_libraries() -> None:
    """Once they are imported: Lightning sets its own level then, and transformers draws a bar for each file."""
    if os.environ.get("SDTUNE_VERBOSE"):
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
