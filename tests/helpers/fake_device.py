"""A device that is none: tensors in memory that only count as being on it once something has put them there.

In `FakeDevice` the device `cpu:0` plays the GPU, and `cpu` is the host: `.to(device)` and `torch.zeros(...,
device=device)` make tensors of the class `OnDevice`, and so is all that is computed of them and of parameters. What a
GPU would have to copy is counted, and an operation that it would refuse, since its operands lie on both sides, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cpu", 0)
BACK = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
MIXING = {Tensor.__getitem__, Tensor.__setitem__}  # a GPU takes indices and values from the host's memory
Copy = tuple[str, tuple[int, ...], int]  # the function's name, the tensor's shape and bytes


class OnDevice(Tensor):
    """A tensor that the device holds."""

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # files hold tensors


class FakeDevice(TorchFunctionMode):
    """Counts copies while it is entered. Parameters are on the device, as every module that is used was moved there."""

    def __init__(self) -> None:
        super().__init__()
        self.up: list[Copy] = []  # to the device
        self.down: list[Copy] = []  # from it

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        held = [tensor for tensor in tensors if isinstance(tensor, (OnDevice, nn.Parameter))]
        if func == Tensor.device.__get__:
            return DEVICE if held else func(*args)
        result = func(*args, **options)
        if func in BACK and held:
            self.down.append(_copy(func, held[0]))
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        if DEVICE in (*(a for a in args if isinstance(a, torch.device)), options.get("device")) and not held:
            if tensors or func in (torch.tensor, torch.as_tensor):
                self.up.append(_copy(func, result))
            return _on_device(result)
        if held:
            self._mix(func, tensors)
            return _on_device(result)
        return result

    def _mix(self, func: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        """Operands on both sides: numbers are taken along, indices and values to be put somewhere are copied."""
        others = [tensor for tensor in tensors if not isinstance(tensor, (OnDevice, nn.Parameter)) and tensor.dim()]
        if others and func not in MIXING:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise AssertionError(f"{func.__name__}: operands lie on the device and beside it: {shapes}")
        self.up += [_copy(func, tensor) for tensor in others]


def _on_device(result: Any) -> Any:
    return tree_map_only(
        Tensor, lambda t: t if isinstance(t, (OnDevice, nn.Parameter)) else t.as_subclass(OnDevice), result
    )


def _copy(func: Callable[..., Any], tensor: Tensor) -> Copy:
    return func.__name__, tuple(tensor.shape), tensor.numel() * tensor.element_size()
