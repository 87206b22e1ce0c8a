"""A rehearsal of the GPU on the CPU, with tensors that are on `cuda` in name only and hold no values.

Inside `Rehearsal`, tensors on `cuda` are torch's fake tensors: they have the shapes, types and devices that CUDA would
give, and mixing devices is an error. Tensors on the CPU are computed as usual. Each operation at which the host would
wait for the device is recorded. It returns made-up values: zeros for numbers, True for conditions (False after `any`),
and half of the possible elements where their number depends on values.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
VALUE, SHAPE, COPY = "a value", "a number of elements", "a copy to the host"  # what the host waits for


class Rehearsal(TorchDispatchMode):
    """Records in `waits` what the host waits for; `kernels` is the number of operations on the device."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake, self.waits, self.kernels = fake, [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        held = [tensor for tensor in tensors if isinstance(tensor, FakeTensor) and tensor.is_cuda]
        target, name = options.get("device"), func.name()
        if name in ("aten::_pin_memory", "aten::is_pinned"):
            return args[0] if name == "aten::_pin_memory" else True
        if not held and (target is None or torch.device(target).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **options)
        self.kernels += 1
        if name == "aten::_local_scalar_dense":
            self.waits.append(VALUE)
            kind = held[0].dtype
            return not getattr(held[0], "is_any", False) if kind == torch.bool else 0.0 if kind.is_floating_point else 0
        if name in ("aten::_to_copy", "aten::copy_") and self._target(name, args, target).type != "cuda":
            self.waits.append(COPY)
            with unset_fake_temporarily():
                if name == "aten::copy_":
                    return args[0].zero_()
                return torch.zeros(args[0].shape, dtype=options.get("dtype") or args[0].dtype)
        if name == "aten::nonzero":
            self.waits.append(SHAPE)
            with self.fake:
                return torch.empty(args[0].numel() // 2, args[0].dim(), dtype=torch.long, device=CUDA)
        if name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put"):
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        args, options = tree_map_only(Tensor, self._fake, (args, options))
        with self.fake:
            result = func(*args, **options)
        if name.startswith("aten::any"):
            result.is_any = True
        return result

    @staticmethod
    def _target(name: str, args: Any, target: Any) -> torch.device:
        return args[0].device if name == "aten::copy_" else torch.device(target or args[0].device)

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """A boolean index as index tensors, for which the host waits on a GPU; other indices unchanged."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        self.waits.append(SHAPE)
        with self.fake:
            return list(torch.empty(index.dim(), index.numel() // 2, dtype=torch.long, device=CUDA))

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def moved(self, things: Any) -> Any:
        """Deep copies of modules whose tensors are on the device."""
        with _Move(self):
            return copy.deepcopy(things)


class _Move(TorchFunctionMode):
    """Puts the copies of deeply copied tensors on the device."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self.rehearsal = rehearsal

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:
            return self.move(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), self.move(tensor))
        return func(*args, **(kwargs or {}))

    def move(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


@contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """Enter a `Rehearsal`, in which `backward` sets the gradients of all parameters in the graph to zeros."""

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        seen, nodes = set(), [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [after for after, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)

    with ExitStack() as stack:
        for target, name, value in (
            (Tensor, "backward", backward),
            (Tensor, "pin_memory", lambda self, *_: self),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "mem_get_info", lambda *_: (2**33, 2**34)),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(warnings.catch_warnings())
        mode = Rehearsal(stack.enter_context(FakeTensorMode()))
        yield stack.enter_context(mode)
