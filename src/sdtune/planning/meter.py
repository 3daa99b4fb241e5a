"""Count the memory and FLOPs of a computation for each operation, also on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sdtune.torch_compat import TorchDispatchMode, operator_of, storage_key, tree_leaves


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts allocated bytes after each operation, and floating-point operations.

    Each storage counts once, from the operation that creates it until its last tensor is freed, as in an allocator. So
    the peak includes tensors saved by autograd, recomputed activations and temporary tensors.

    Attributes:
        flop: floating-point operations of matrix products, attention and convolutions so far
            (:mod:`torch.utils.flop_counter`).
        activations: peak in bytes, without tensors of :meth:`put_aside`.
        together: peak in bytes, with tensors of :meth:`put_aside`.
        live: bytes allocated now, without tensors of :meth:`put_aside`.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """``known``: existing tensors, which are not counted."""
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

        def on_free(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.live -= size

        self._alive[key] = weakref.ref(storage, on_free), size
        self.live += size
        self.activations = max(self.activations, self.live)
        self.together = max(self.together, self.live + self._aside)

    def put_aside(self, tensor: Tensor) -> None:
        """Stop counting ``tensor``, a finished gradient, as an activation. Gradients may share one storage."""
        if storage_key(tensor) in self._known:
            return
        _, size = self._alive.pop(storage_key(tensor))
        self.live -= size
        self._aside += size
        self._known.add(storage_key(tensor))
