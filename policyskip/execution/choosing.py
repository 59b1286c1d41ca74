"""Whether kernels can run a network here is found out by looking and, on a GPU, by trying once.

Shapes: B images, S decisions for each image, K blocks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

from policyskip.backbones.base import Backbone, Network
from policyskip.errors import UserError, in_one_line
from policyskip.execution.kernel_network import KernelNetwork
from policyskip.finite import find_nonfinite
from policyskip.parallel import processes

LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels are for: those that have TF32 and bfloat16."""

_said: set[str] = set()


def interpreted() -> bool:
    """Return whether Triton's interpreter runs kernels, which it does on a CPU too, slowly (``TRITON_INTERPRET=1``, or
    what else Triton takes for a yes)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def no_kernels_on(device: torch.device, may_interpret: bool) -> str:
    """Return in one clause why no kernel can run on a device; an empty text if one can.

    Args:
        may_interpret: whether Triton's interpreter is good enough, as it is where kernels are asked for.
    """
    if sys.platform != "linux":
        return "kernels need Linux"
    if device.type != "cuda" and not (may_interpret and interpreted()):
        return "this is a CPU" if device.type == "cpu" else f"the device is {device.type}"
    if device.type == "cuda" and torch.version.hip:
        return "kernels are for NVIDIA GPUs"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, and kernels need 8.0"
    try:
        import_module("triton")
    except Exception as error:  # it loads libraries, which can fail in any way
        return f"Triton cannot be imported ({in_one_line(error, 80)})"
    if interpreted() and not may_interpret:
        return "TRITON_INTERPRET is set, and the interpreter is slow"
    return ""


@torch.no_grad()
def check_range(network: Network, image_shape: tuple[int, int, int]) -> None:
    """Refuse a network in float16 whose numbers are too large for it, for a black, a white or a striped image: answers
    would be NaN, and be taken for class 0.

    Raises:
        UserError: they are.
    """
    if network.mean.dtype != torch.float16:
        return
    images = torch.zeros(3, *image_shape, dtype=torch.uint8, device=network.mean.device)
    images[1], images[2, :, :, ::2] = 255, 255
    if find_nonfinite(network.state_dict()) is not None or not network(images).isfinite().all():
        raise UserError(f"precision=float16 cannot hold the numbers of {network.name}: say bfloat16 or float32")


def kernels_for(folded: Backbone, image_shape: tuple[int, int, int], exact: bool) -> tuple[KernelNetwork | None, str]:
    """Make the kernels of a network where kernels can run.

    Args:
        folded, image_shape, exact: see :class:`KernelNetwork`.

    Returns: the kernels, tried once if they are on a GPU, and in one clause what they are. None, and why not, if the
        network does not fit, or its kernels do not compile or run.
    """
    reasons = []
    for kind in candidates():
        if reason := kind.why_not(folded, image_shape):
            reasons.append(reason)
            continue
        try:
            with on_device(folded.mean.device):
                kernels = kind(folded, image_shape, exact)
                if folded.mean.is_cuda:
                    _try_once(kernels)
        except Exception as error:  # compilers and drivers raise exceptions of every type
            reasons.append(f"the kernels do not run here ({in_one_line(error, 100)})")
            continue
        return kernels, in_a_clause(kind)
    return None, "; ".join(dict.fromkeys(reasons)) or "there are no kernels for such networks"


def candidates() -> Iterator[type[KernelNetwork]]:
    """Yield the kinds of kernels, the fastest first."""
    from policyskip.execution.stage_network import StageNetwork
    from policyskip.execution.tile_network import TileNetwork

    yield from (StageNetwork, TileNetwork)


def in_a_clause(kind: type[KernelNetwork]) -> str:
    """Return in one clause what a kind of kernels does."""
    return {"StageNetwork": "a residual stage in one kernel", "TileNetwork": "a tile of an image in one program"}.get(
        kind.__name__, kind.__name__
    )


@torch.no_grad()
def _try_once(kernels: KernelNetwork) -> None:
    """Run all blocks for one black image, which compiles every kernel; whatever goes wrong is raised."""
    device, K = kernels.folded.mean.device, kernels.folded.num_blocks
    image = torch.zeros(1, *kernels.image_shape, dtype=torch.uint8, device=device)
    logits = kernels.logits(image, torch.ones(1, 1, K, dtype=torch.bool, device=device))
    torch.cuda.synchronize(device)
    expected = (1, 1, kernels.folded.num_classes)
    if tuple(logits.shape) != expected:
        raise RuntimeError(f"logits {tuple(logits.shape)} instead of {expected}")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on a device: Triton launches them on the GPU that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def say_once(line: str) -> None:
    """Print a line on the standard error, unless it was printed before; of several processes, the first prints it."""
    if line not in _said and processes.is_first():
        _said.add(line)
        print(line, file=sys.stderr)


@contextmanager
def launching_on(device: torch.device, exact: bool) -> Iterator[None]:
    """Let the body launch kernels on a device, and compute float32 in torch without TF32 if it must be exact."""
    with on_device(device), full_float32() if exact else nullcontext():
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Let torch compute products of float32 on a GPU in full float32 and not in TF32."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
