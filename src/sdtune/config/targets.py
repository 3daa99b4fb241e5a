"""Classes and functions that a config may name as ``_target_``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

from sdtune.errors import UserError

ALLOWED = (
    "sdtune",
    "torch.optim",
    "pytorch_lightning",
    "transformers.optimization",
    "bitsandbytes.optim",
    "prodigyopt",
)
"""Packages whose classes and functions a config may name; users add their own with ``trust=[...]``."""

_EXTRAS = dict.fromkeys(("bitsandbytes", "prodigyopt"), ", or install 'sdtune[optimizers]'")


def _trusted(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _allowed(module: str, trust: Sequence[str]) -> bool:
    return _trusted(module, (*ALLOWED, *trust))


def resolve(target: str, key: str, trust: Sequence[str] = ()) -> Any:
    """Import the class or function ``target``.

    The module that defines the object must be allowed. A check of the prefix of ``target`` alone could be bypassed
    through the imports of a module, as in ``pytorch_lightning.trainer.os.system``.

    Raises:
        UserError: the package is not allowed or not installed, or ``target`` is neither a class nor a function of a
            package in ``trust``.
    """
    if not _allowed(target.rpartition(".")[0], trust):
        raise UserError(
            f"{target} is not allowed",
            key=f"{key}._target_",
            remedy=f"add trust=[{target.split('.')[0]}] if you trust it",
        )
    resolved: Any = None
    parts = target.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        try:
            resolved = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError as error:
            if error.name and not target.startswith(error.name):
                remedy = f"install it with pip{_EXTRAS.get(error.name.split('.')[0], '')}"
                raise UserError(
                    f"{target} needs the package {error.name}", key=f"{key}._target_", remedy=remedy
                ) from error
            continue
        for part in parts[depth:]:
            resolved = getattr(resolved, part, None)
        break
    if resolved is None and importlib.util.find_spec(parts[0]) is None:
        raise UserError(
            f"{target} needs the package {parts[0]}",
            key=f"{key}._target_",
            remedy=f"install it with pip{_EXTRAS.get(parts[0], '')}",
        )
    if not (inspect.isclass(resolved) or inspect.isfunction(resolved)):
        raise UserError(f"{target} is neither a class nor a function", key=f"{key}._target_")
    if not _allowed(resolved.__module__, trust):
        raise UserError(
            f"{target} is defined in {resolved.__module__}, which is not allowed",
            key=f"{key}._target_",
            remedy=f"add trust=[{resolved.__module__.split('.')[0]}] if you trust it",
        )
    if inspect.isfunction(resolved) and not _trusted(resolved.__module__, trust):
        # A config may build objects, but not call any function of sdtune or of a library.
        raise UserError(f"{target} is a function, not a class", key=f"{key}._target_")
    return resolved
