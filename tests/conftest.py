"""Small networks and images that every test can afford, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; to be said before Triton is imported

import matplotlib.font_manager  # noqa: F401 - its cache of fonts is made before XDG_CACHE_HOME changes
import pytest
import torch.nn.functional as F
from hydra._internal.hydra import Hydra
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import Tensor, nn

from policyskip import cli
from policyskip.backbones import ExitCosts
from policyskip.backbones.resnet import CifarResNet
from policyskip.data import TensorImages
from policyskip.exits.cache import CachedExits
from policyskip.runs import progress

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = os.environ.get("OMP_NUM_THREADS", str(max(1, 2 // WORKERS)))
torch.set_num_threads(int(THREADS))
if WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = THREADS  # for the processes that tests start: more threads wait for each other


def small_backbone(
    depth: int = 14, classes: int = 5, shortcut: str = "pool", width: int = 4, seed: int = 0
) -> CifarResNet:
    """A random CIFAR ResNet in evaluation mode whose batch normalisation does something."""
    with torch.random.fork_rng(devices=[]):  # so that nothing under test is seeded by this
        torch.manual_seed(seed)
        backbone = CifarResNet(depth, classes, shortcut, width)  # type: ignore[arg-type]
        with_statistics(backbone)
    return backbone.eval()


def with_statistics(network: nn.Module) -> nn.Module:
    """The network, its batch normalisation with random statistics and weights."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def small_images(count: int = 40, classes: int = 5, size: int = 12, seed: int = 0) -> TensorImages:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return TensorImages(images, torch.randint(0, classes, (count,), generator=generator))


class BlackAndWhite(TensorImages):
    """Images of class 0 are black, those of class 1 white."""

    def __init__(self, count: int = 64) -> None:
        label_N = torch.arange(count) % 2
        images = (255 * label_N).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 12, 12).contiguous()
        super().__init__(images, label_N)


def small_cache(count: int = 40, exits: int = 3, classes: int = 5, seed: int = 0) -> CachedExits:
    """Made-up outputs: later exits are surer and more often right, and images differ in difficulty."""
    generator = torch.Generator().manual_seed(seed)
    label_M = torch.randint(0, classes, (count,), generator=generator)
    logits_MNC = torch.randn(count, exits, classes, generator=generator)
    ease_MN = 4 * torch.rand(count, 1, generator=generator) * torch.linspace(0.6, 1, exits)
    logits_MNC += ease_MN.unsqueeze(2) * F.one_hot(label_M, classes).unsqueeze(1)
    trunk_N, head_N = torch.linspace(3, 5, exits).double(), torch.linspace(1, 0.5, exits).double()
    return CachedExits(logits_MNC, label_M, ExitCosts(trunk_N, head_N))


@pytest.fixture
def backbone() -> CifarResNet:
    return small_backbone()


@pytest.fixture
def images() -> Tensor:
    return small_images(7).images


def blank_picture(figure: Figure, path: BinaryIO, **options: Any) -> None:
    """Write a picture of one pixel in the figure's place."""
    Image.new("RGB", (1, 1)).save(path, "PNG")


def without_waits(stderr: str) -> list[str]:
    """The lines of what a process wrote on its standard error, but for those that say what is waited for."""
    return [line for line in stderr.splitlines() if not re.search(r" (so far …|left|took \d.*)$", line)]


def _small_front(arguments: tuple[str, ...]) -> list[str]:
    """A short search of fixed blocks for a new run over exits that says nothing of it: the usual one takes minutes."""
    over_exits = {"env=early_exit", *(f"agent={name}" for name in ("branchynet", "cdl", "distiller", "msdnet"))}
    new = arguments[:1] == ("train",) and over_exits.intersection(arguments)
    if not new or any(word.startswith(("front.", "run.resume=", "--")) for word in arguments):
        return []
    return ["front.budget=4e3", "front.images=20"]


def typed(*arguments: str, cwd: Path, drawn: bool = False) -> subprocess.CompletedProcess[str]:
    """``policyskip`` with these arguments in folder ``cwd``, as the shell would run it, but in this process.

    Figures are made in full, but laid out and painted, which takes a third of the time of a small run, only if ``drawn``.
    Hydra composes the configuration once, not twice: the first time is only to read hydra.mode, which is None here.
    """
    printed, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        patch.chdir(cwd)
        patch.setattr(Hydra, "get_mode", lambda *_args, **_options: None)
        patch.setattr(progress, "show", lambda: None)  # on a busy machine, anything may take two seconds
        if not drawn:
            patch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
            patch.setattr(Figure, "savefig", blank_picture)
        patch.setattr(sys, "argv", ["policyskip", *arguments, *_small_front(arguments)])
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("HYDRA_FULL_ERROR", "")
        patch.setenv("COLUMNS", "200")
        patch.setenv("XDG_CACHE_HOME", str(cwd.parent / "cache"))  # nothing is remembered from elsewhere
        patch.delitem(sys.modules, "my_rewards", raising=False)
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        sys.modules.pop("my_rewards", None)
    return subprocess.CompletedProcess(arguments, int(code or 0), printed.getvalue(), errors.getvalue())
