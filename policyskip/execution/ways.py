"""The ways to execute a network whose blocks are skipped, and how one is chosen.

- ``kernel``: Triton kernels on a GPU, in which a skipped block is a branch that is not taken.
- ``gather``: each block for the images that keep it, copied together (``backbones/execution.py``).
- ``dense``: each block for all images, and its output chosen per image; the reference.
- ``auto``: ``kernel`` where that is possible, otherwise ``gather``.

Shapes: B images, S decisions for each image, K blocks, M of them in a row, C channels or classes, H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Network
from policyskip.backbones.execution import check_keep, dense, run_block, sparse, sparse_many
from policyskip.backbones.folding import folded
from policyskip.errors import UserError, check_choice, in_one_line
from policyskip.execution.choosing import check_range, kernels_for, launching_on, no_kernels_on, say_once
from policyskip.execution.cuda_graphs import Call, CudaGraphs, Tensors
from policyskip.execution.kernel_network import KernelNetwork, refuse_gradients
from policyskip.memory import is_out_of_memory

WAYS = ("auto", "kernel", "gather", "dense")
PRECISIONS = {
    "float32": torch.float32,
    "float32_exact": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

TOLERANCES = {"float32": 0.05, "float32_exact": 0.01, "bfloat16": 0.25, "float16": 0.1}
"""By how much logits of kernels may differ from those of gathering, as shares of the logits' mean size, both averaged
over the classes. Rounding stays below a fifth of this; a fault in a kernel or its compiler, or a race, does not."""

CHECKED = (4, 64)
"""Decisions and images on which the kernels are checked, at most."""


class How(NamedTuple):
    """Says how a network is to be executed: the way, one of :data:`WAYS`, and the precision, of :data:`PRECISIONS`."""

    way: str = "auto"
    precision: str = "float32"

    def checked(self) -> Self:
        """Return it.

        Raises:
            UserError: there is no such way or precision.
        """
        check_choice("execution", self.way, WAYS)
        check_choice("precision", self.precision, PRECISIONS)
        return self


DEFAULT = How()
NOTHING = nullcontext()


class NetworkExecution:
    """Holds a network ready to be executed, and the way that was chosen for it; subclasses say what is executed.

    Args:
        network: it is left as it is.
        image_shape: (3, H, W).
        way: see :data:`WAYS`.
        precision: ``float32``, in which a GPU may compute in TF32; ``float32_exact``, in which it does not;
            ``bfloat16`` or ``float16``.
        as_it_is: without kernels and in float32, execute the network itself and no folded copy: for a network that
            still learns, whose figures must not differ by rounding from those of its own forward pass.

    Attributes:
        network: the network that is executed: in most cases a copy with batch normalisation folded into convolutions.
        way: ``kernel``, ``gather`` or ``dense``.
        why: in one clause why it is that way.
        kernels: the kernels; None unless the way is ``kernel``.
        device: that the network is on.

    Raises:
        UserError: there is no such way or precision, a weight is not finite, float16 cannot hold the network's numbers,
            or kernels were asked for where there can be none.
    """

    network: Any

    def __init__(
        self,
        network: Network,
        image_shape: tuple[int, int, int],
        way: str = "auto",
        precision: str = "float32",
        as_it_is: bool = False,
    ) -> None:
        self.asked_way, self.precision = How(way, precision).checked()
        self.image_shape, self.as_it_is = image_shape, as_it_is and PRECISIONS[precision] == torch.float32
        self.kernels: KernelNetwork | None = None
        self._given = network if self.as_it_is else None
        if not self.as_it_is:
            self.network = _copy(network, precision)
            check_range(self.network, image_shape)
        self._choose()

    @abstractmethod
    def _backbone(self, network: Any) -> Backbone | None:
        """Return the part of a network that kernels can run: blocks; None if it has no such part."""

    def _choose(self) -> None:
        """Choose the way on the device that the network is on now."""
        network: Any = self._given if self.as_it_is else self.network
        self.device: torch.device = network.mean.device
        self._on_gpu = self.device.type == "cuda"
        self.kernels, self.why = None, "as asked"
        self.way = self.asked_way if self.asked_way in ("gather", "dense") else "gather"
        if self.asked_way in ("auto", "kernel"):
            must = self.asked_way == "kernel"
            self.why = no_kernels_on(self.device, may_interpret=must)
            if not self.why and self._backbone(network) is None:
                self.why = f"there are no kernels for {type(network).__name__}"
            if not self.why:
                copy = _copy(network, self.precision) if self.as_it_is else network
                backbone = self._backbone(copy)
                assert backbone is not None
                self.kernels, self.why = kernels_for(backbone, self.image_shape, self.precision == "float32_exact")
                network = copy if self.kernels is not None else network
            if self.kernels is not None:
                self.way = "kernel"
            elif must:
                raise UserError(f"execution=kernel cannot be: {self.why}; say execution=auto")
            elif self._on_gpu:
                say_once(f"no kernels for {network.name}, so images are gathered: {self.why}")
        self.network = network
        self._graphs: dict[Hashable, CudaGraphs] = {}
        self._advanced: set[Hashable] = set()
        self._checked: set[int] = set()

    def to(self, device: str | torch.device) -> Self:
        """Move the network, choose the way again for where it is now, and return the execution.

        Raises:
            UserError: kernels were asked for, and there can be none on the new device; everything stays as it was.
        """
        network: Any = self._given if self.as_it_is else self.network
        if (before := self.device) != torch.device(device):
            network.to(device)
            try:
                self._choose()
            except UserError:
                network.to(before)
                self._choose()
                raise
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what can be copied: kernels and CUDA graphs are made again."""
        return {**self.__dict__, "kernels": None, "_graphs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._choose()

    def by_kernels(self, name: Hashable, call: Call, *inputs: Tensor) -> Tensors | None:
        """Make a call that runs kernels and asks nothing of the host, in a CUDA graph where there is one.

        Args:
            name: of the call: calls of one name must do the same. None: the call is made without a graph.
            inputs: tensors on the device, the call's arguments; they are not overwritten.

        Returns: the call's tensors; None where there are no kernels, or none any more, because they failed, or for no
            images: the caller then gathers.

        Raises:
            ValueError: gradients are wanted, or an argument is refused.
            UserError: the kernels failed, and ``execution=kernel`` was asked for.
            torch.OutOfMemoryError: the GPU's memory does not suffice.
        """
        if self.kernels is None or not len(inputs[0]):
            return None
        refuse_gradients(self.network, *inputs)
        try:
            with torch.no_grad(), self.exactly():
                return call(*inputs) if name is None else self._graphs.setdefault(name, CudaGraphs(call))(*inputs)
        except Exception as error:  # compilers and drivers raise exceptions of every type
            if isinstance(error, ValueError) or is_out_of_memory(error):
                raise
            self._give_kernels_up(error)
        return None

    def _give_kernels_up(self, error: Exception) -> None:
        """Change the way to gathering, because a kernel failed: other numbers of images may need other kernels.

        Raises:
            UserError: ``execution=kernel`` was asked for.
        """
        why = f"the kernels do not run here ({in_one_line(error, 100)})"
        if self.asked_way == "kernel":
            raise UserError(f"execution=kernel cannot be: {why}; say execution=auto") from error
        self.kernels, self.way, self.why, self._graphs = None, "gather", why, {}
        say_once(f"no kernels for {self.network.name}, so images are gathered: {why}")

    def exactly(self) -> AbstractContextManager[Any]:
        """Return a context in which kernels are launched on the network's GPU, and float32 is exact if the precision
        says so; on a CPU there is nothing to do."""
        return launching_on(self.device, self.precision == "float32_exact") if self._on_gpu else NOTHING


class Execution(NetworkExecution):
    """Executes a backbone for images, each with its own blocks. For the arguments see :class:`NetworkExecution`."""

    network: Backbone

    def _backbone(self, network: Any) -> Backbone | None:
        return network if isinstance(network, Backbone) else None

    def _by_kernels(self, images: Tensor, keep_SBK: Tensor) -> Tensors:
        assert self.kernels is not None
        return (self.kernels.logits(images, keep_SBK),)

    def logits(self, images: Tensor, keep_BK: Tensor, break_even_K: Sequence[float] | None = None) -> Tensor:
        """Compute logits (B, C) of images (B, 3, H, W), each with the blocks that ``keep_BK``, bool (B, K), keeps.

        Args:
            break_even_K: where images are gathered, see :func:`~policyskip.backbones.execution.sparse`.

        Raises:
            ValueError: ``keep_BK`` is of another kind or shape, or gradients are wanted of kernels.
        """
        if self.kernels is not None and len(images):
            return self.logits_many(images, keep_BK.unsqueeze(0))[0]
        with self.exactly():
            if self.way == "dense":
                return dense(self.network, images, keep_BK)
            return sparse(self.network, images, keep_BK, break_even_K)

    def logits_many(self, images: Tensor, keep_SBK: Tensor, may_record: bool = True) -> Tensor:
        """Compute logits (S, B, C) of S decisions for each image, bool (S, B, K), in one pass.

        Args:
            may_record: whether a CUDA graph may be recorded, which is worth while if many batches have this shape.

        Raises:
            ValueError: ``keep_SBK`` is of another kind or shape, or gradients are wanted of kernels.
        """
        check_keep(self.network, images, keep_SBK[0])
        name = "logits" if may_record else None
        found = self.by_kernels(name, self._by_kernels, images, keep_SBK.to(images.device))
        if found is not None and self._agrees(found[0], images, keep_SBK):
            return found[0]
        with self.exactly():
            if self.way == "dense":
                return torch.stack([dense(self.network, images, keep_BK) for keep_BK in keep_SBK])
            return sparse_many(self.network, images, keep_SBK)

    def _agrees(self, logits_SBC: Tensor, images: Tensor, keep_SBK: Tensor) -> bool:
        """Return whether kernels give what gathering gives; otherwise give the kernels up.

        It is found out on some of the images when a batch first comes, or first comes twice as large.

        Raises:
            UserError: they do not, and ``execution=kernel`` was asked for.
        """
        if (size := keep_SBK[..., 0].numel().bit_length()) in self._checked:
            return True
        some = (slice(CHECKED[0]), slice(CHECKED[1]))
        with torch.no_grad(), self.exactly():
            expected_SBC = sparse_many(self.network, images[some[1]], keep_SBK[some]).float()
            off_SB = (logits_SBC[some].float() - expected_SBC).abs().mean(-1)
            allowed = TOLERANCES[self.precision] * expected_SBC.abs().nanmean() + 1e-6
            wrong = int((~(off_SB <= allowed) & expected_SBC.isfinite().all(-1)).sum())  # NaN is not as allowed either
        if wrong:
            self._give_kernels_up(RuntimeError(f"of {off_SB.numel()} answers {wrong} are not those of gathering"))
            return False
        self._checked.add(size)
        return True

    def whole(self, images: Tensor) -> Tensor:
        """Compute logits (B, C) of images (B, 3, H, W) with all blocks.

        Raises:
            ValueError: gradients are wanted of kernels.
        """
        if self.kernels is not None and len(images):
            shape = (len(images), self.network.num_blocks)
            return self.logits(images, torch.ones(shape, dtype=torch.bool, device=images.device))
        with self.exactly():
            return self.network(images)

    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W) that enter block 0, for :meth:`advance`."""
        return self._part("features", images)

    def _part(self, name: str, x: Tensor) -> Tensor:
        """Compute a part of the network, by kernels where there are any."""
        found = self.by_kernels(None, lambda x: (getattr(self.kernels, name)(x),), x)
        with self.exactly():
            result: Tensor = getattr(self.network, name)(x) if found is None else found[0]
        return result

    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        """Run the M blocks from ``first`` on, each for the images that ``keep_BM``, bool (B, M), keeps.

        Args:
            x: features (B, C, H, W) that enter the first of them; the caller's own, and overwritten.

        Returns: the features (B, C, H, W) after them.

        Raises:
            ValueError: gradients are wanted of kernels.
            UserError: kernels failed that ran before, or were asked for.
        """
        if self.kernels is not None and len(x):
            refuse_gradients(self.network, x)
            key = (x.shape, keep_BM.shape, first)
            spare = None if key in self._advanced else x.clone()  # kernels that are new may fail when x is overwritten
            try:
                with torch.no_grad(), self.exactly():
                    result = self.kernels.advance(x, keep_BM.to(x.device), first)
                self._advanced.add(key)
                return result
            except Exception as error:
                if isinstance(error, ValueError) or is_out_of_memory(error):
                    raise
                self._give_kernels_up(error)
                if spare is None:
                    raise UserError(f"{self.why}, between two blocks; start again with execution=gather") from error
                x = spare
        with self.exactly():
            for block, keep_B in zip(self.network.blocks[first:], keep_BM.unbind(1), strict=False):
                if self.way == "dense":
                    shortcut, keep_B111 = block.shortcut(x), keep_B.to(x.device).view(-1, 1, 1, 1)
                    x = torch.where(keep_B111, block.join(shortcut, x), shortcut)
                else:  # rows are found on the CPU: on a GPU, ``nonzero`` would wait for all that it still has to do
                    x = run_block(block, x, keep_B.cpu().nonzero().squeeze(1).to(x.device))
            return x

    def head(self, x: Tensor) -> Tensor:
        """Compute logits (B, C) from the features (B, C, H, W) after the last block."""
        return self._part("head", x)


def _copy(network: Network, precision: str) -> Any:
    """Return a frozen copy of a network with batch normalisation folded into its convolutions, in a precision."""
    return folded(network).freeze().to(PRECISIONS[precision])
