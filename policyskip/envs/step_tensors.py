"""Rewards and ends of episodes are tensors that numpy's functions take too, as Gymnasium's wrappers need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class StepTensor(Tensor):
    """A tensor from which numpy's functions and operators compute arrays, wherever it is.

    Gymnasium's wrappers of vector environments that count or scale rewards are written in numpy. What torch computes
    from it is an ordinary tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*arrays(inputs), **arrays(kwargs))

    def __array_function__(self, function: Callable[..., Any], types: Any, inputs: Any, kwargs: Any) -> Any:
        return function(*arrays(inputs), **arrays(kwargs))

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(index).as_subclass(StepTensor)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, torch.as_tensor(value) if isinstance(value, np.generic | np.ndarray) else value)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what a pickled copy is made of, which is an ordinary tensor: checkpoints hold no other."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    def __rsub__(self, other: Any) -> Any:
        whole = self.int() if self.dtype == torch.bool else self  # as numpy does with bool
        return torch.rsub(whole, other).as_subclass(StepTensor)


def for_numpy(reward_B: Tensor, terminated_B: Tensor, truncated_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a step gives, each (B,), as tensors that numpy's functions take."""
    return (
        reward_B.as_subclass(StepTensor),
        terminated_B.as_subclass(StepTensor),
        truncated_B.as_subclass(StepTensor),
    )


def arrays(values: Any) -> Any:
    """Replace each tensor in nested lists, tuples and dictionaries by an array."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().as_subclass(Tensor).numpy(), values)
