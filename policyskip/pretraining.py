"""Supervised training of a CIFAR ResNet with stochastic depth, so that it stays accurate when blocks are skipped.

Shapes: B images, K blocks, H W pixels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.agents.schedules import one_cycle
from policyskip.backbones import sparse
from policyskip.backbones.execution import run_block_together
from policyskip.backbones.resnet import CifarResNet
from policyskip.data import Feed, Images, sequential, spread_indices
from policyskip.errors import UserError
from policyskip.execution.ways import Execution
from policyskip.finite import check_finite, check_gradients
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import Divisible
from policyskip.parallel.deferred import Figure, figure, sent
from policyskip.runs.progress import waiting


class Pretrainer(Divisible):
    """Trains a network by SGD with Nesterov momentum on the cross-entropy; the learning rate rises and falls once.

    Args:
        backbone: the network to train.
        total_steps: updates of the whole run.
        seed: seed of the generator that decides which blocks are dropped.
        lr, momentum, weight_decay: of SGD.
        stochastic_depth: "none"; "linear" keeps block k of K with probability ``1 − k/K (1 − survival)`` (Huang et al.
            2016); "uniform" draws one keep probability for each image from [survival, 1], so that the network is
            trained on every number of blocks.
        survival: the lowest keep probability.

    Raises:
        UserError: an argument is out of range.
    """

    may_skip_parameters = True

    def __init__(
        self,
        backbone: CifarResNet,
        total_steps: int,
        seed: int = 0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        stochastic_depth: Literal["none", "linear", "uniform"] = "uniform",
        survival: float = 0.2,
    ) -> None:
        if stochastic_depth not in ("none", "linear", "uniform"):
            raise UserError(f"pretrain.stochastic_depth must be none, linear or uniform, got {stochastic_depth!r}")
        if total_steps < 1:
            raise UserError(f"train.steps must be at least 1, got {total_steps}")
        if not 0 < survival <= 1 or lr <= 0:
            raise UserError(f"pretrain.survival must be in (0, 1] and pretrain.lr positive, got {survival} and {lr}")
        self.backbone = backbone
        self.stochastic_depth, self.survival = stochastic_depth, survival
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.SGD(
            backbone.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: one_cycle(step / total_steps))

    def update(self, feed: Feed) -> dict[str, Figure]:
        """Take one step on the batch that the feed shows, and let it show the next one.

        Dropped blocks are not computed, so the statistics of a block's batch normalisation are those of the images
        that it was computed for.

        Returns: loss, accuracy and learning rate of the step.

        Raises:
            NotFiniteError: logits, loss or gradients are not finite.
        """
        batch = feed.batch
        self.backbone.train()
        logits_BC = self.forward_through_ddp(self._pass, batch.images, self._sample(len(batch)))
        loss = F.cross_entropy(logits_BC, batch.label_B)
        update = self.schedule.last_epoch + 1
        check_finite("pretrain", update, logits=logits_BC, loss=loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        check_gradients("pretrain", update, self.optimizer)
        self.optimizer.step()
        self.schedule.step()
        feed.advance()
        accuracy = figure((logits_BC.argmax(1) == batch.label_B).float().mean())
        return {"loss": figure(loss), "accuracy": accuracy, "lr": float(self.schedule.get_last_lr()[0])}

    @property
    def trainable_modules(self) -> list[nn.Module]:
        return [self.backbone]

    def _pass(self, images: Tensor, keep_BK: Tensor) -> Tensor:
        """Return logits (B, C) of images uint8 (B, 3, H, W), each with the blocks of its row of keep, bool (B, K)."""
        if processes.world() == 1:
            return sparse(self.backbone, images, keep_BK)
        x = self.backbone.features(images)
        for block, keep_B in zip(self.backbone.blocks, keep_BK.unbind(1), strict=True):
            x = run_block_together(block, x, sent(keep_B.nonzero().squeeze(1), x.device))
        return self.backbone.head(x)

    def _sample(self, images: int) -> Tensor:
        """Draw which blocks run for each image of this process, bool (B, K)."""
        return processes.this_process_slice(self._sample_whole(processes.world() * images))

    def _sample_whole(self, B: int) -> Tensor:
        """Draw which blocks run for each of the B images of all processes together, bool (B, K)."""
        K = self.backbone.num_blocks
        if self.stochastic_depth == "none":
            return torch.ones(B, K, dtype=torch.bool)
        if self.stochastic_depth == "linear":
            keep_probability = 1 - torch.arange(1, K + 1) / K * (1 - self.survival)
        else:
            keep_probability = self.survival + (1 - self.survival) * torch.rand(B, 1, generator=self.generator)
        return torch.rand(B, K, generator=self.generator) < keep_probability

    @torch.no_grad()
    def accuracies(self, images: Images, batch_size: int = 250, way: str = "auto") -> dict[str, float]:
        """Return the fraction of the images classified correctly with all blocks, and with a random half of them.

        The random half of an image is the same in every call.

        Args:
            way: how the network, as it is now, is executed (see ``execution/ways.py``).

        Raises:
            UserError: the network cannot be executed in that way.
        """
        self.backbone.eval()
        execution: Execution | None = None
        generator = torch.Generator().manual_seed(0)
        full = half = 0
        with waiting("judging the network", len(images)) as wait:
            for batch in images.stream(sequential(len(images), batch_size)):
                _, channels, height, width = batch.images.shape
                execution = execution or Execution(self.backbone, (channels, height, width), way, as_it_is=True)
                half_BK = torch.rand(len(batch), self.backbone.num_blocks, generator=generator) < 0.5
                full += int((execution.whole(batch.images).argmax(1) == batch.label_B).sum())
                half += int((execution.logits(batch.images, half_BK).argmax(1) == batch.label_B).sum())
                wait.advance(len(batch))
        return {"accuracy": full / len(images), "accuracy_half_the_blocks": half / len(images)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.backbone.load_state_dict(state["backbone"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])


def pixel_statistics(images: Images, count: int = 5000) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, for pixels in [0, 1].

    They are taken over ``count`` images spread evenly over the set, or over all images if it has fewer.
    """
    parts = spread_indices(count, len(images)).split(500)
    pixels = [batch.images.float().div(255) for batch in images.stream((part, 0) for part in parts)]
    stacked = torch.cat(pixels).double()
    std, mean = torch.std_mean(stacked, dim=(0, 2, 3), correction=0)
    return [round(float(m), 4) for m in mean], [round(float(s), 4) for s in std]
