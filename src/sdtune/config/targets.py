"""The classes and functions that a config may name as ``_target_``."""

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
"""Packages whose classes and functions a config may name; users add theirs with ``trust=[...]``."""

_EXTRAS = dict.fromkeys(("bitsandbytes", "prodigyopt"), ", or 'sdtune[optimizers]'")


def _trusted(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _allowed(module: str, trust: Sequence[str]) -> bool:
    return _trusted(module, (*ALLOWED, *trust))


def resolve(target: str, key: str, trust: Sequence[str] = ()) -> Any:
    """The class or function that ``target`` names.

    What counts is where the thing found was defined: a prefix on the string alone is bypassed by a path that walks
    through a module's imports, ``pytorch_lightning.trainer.os.system``.
    """
    if not _allowed(target.rpartition(".")[0], trust):
        raise UserError(
            f"{target} is not allowed",
            key=f"{key}._target_",
            remedy=f"add trust=[{target.split('.')[0]}] if you trust it",
        )
    found: Any = None
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not target.startswith(error.name):
                raise UserError(f"{target} needs {error.name}: pip install it", key=f"{key}._target_") from error
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        break
    if found is None and importlib.util.find_spec(parts[0]) is None:
        raise UserError(f"{target} needs {parts[0]}: pip install it{_EXTRAS.get(parts[0], '')}", key=f"{key}._target_")
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise UserError(f"{target} is neither a class nor a function", key=f"{key}._target_")
    if not _allowed(found.__module__, trust):
        raise UserError(f"{target} leads to {found.__module__}, which is not allowed", key=f"{key}._target_")
    if inspect.isfunction(found) and not _trusted(found.__module__, trust):
        # Classes are built; a function is done, whatever it does.
        raise UserError(f"{target} is a function, not a class that can be configured", key=f"{key}._target_")
    return found
