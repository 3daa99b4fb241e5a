"""Count memory and FLOPs of a computation, operation by operation, also on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sdtune.torch_compat import TorchDispatchMode, operator_of, storage_key, tree_leaves


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes that are alive between one operation and the next, and the floating-point operations.

    Each storage counts once, from the operation that makes it until the last tensor on it is gone, as an allocator
    sees it. So the peak holds what autograd saves, what a block computes again, and what passes by.

    Attributes:
        flop: so far, by torch's own formulas (:mod:`torch.utils.flop_counter`): products and convolutions alone.
        activations: peak in bytes of everything but what was put aside.
        together: peak in bytes of that and of what was put aside.
        live: bytes at present of everything but what was put aside.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """``known``: tensors that exist already, and are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop = self.activations = self.together = 0
        self._known = {storage_key(tensor) for tensor in known}
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.live = self._aside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(operator_of(func))
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.live -= size

        self._alive[key] = weakref.ref(storage, gone), size
        self.live += size
        self.activations = max(self.activations, self.live)
        self.together = max(self.together, self.live + self._aside)

    def put_aside(self, tensor: Tensor) -> None:
        """From now on ``tensor``, a gradient that stays, is no activation."""
        _, size = self._alive.pop(storage_key(tensor))
        self.live -= size
        self._aside += size
        self._known.add(storage_key(tensor))
