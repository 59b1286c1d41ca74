"""Pretraining: a CIFAR ResNet learns to classify while blocks are dropped at random, and becomes a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyskip.backbones import checkpoints
from policyskip.backbones.resnet import CifarResNet
from policyskip.build import build, build_backbone, build_data
from policyskip.config import PretrainSettings, group_of
from policyskip.data import Feed
from policyskip.errors import UserError
from policyskip.execution.exits import check_kernels
from policyskip.execution.ways import Execution, How
from policyskip.pretraining import Pretrainer, pixel_statistics
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.base import Task

DEPLOYED = "backbone.safetensors"
"""The file that ``backbone.checkpoint=`` takes."""


class PretrainTask(Task):
    """The task of a network that learns to classify; it is judged with all its blocks and with a random half of them.

    Args:
        content: the run's configuration as plain dictionaries.
        trusted: False refuses classes outside policyskip: the configuration came with a run folder.

    Raises:
        UserError: the network is not a CIFAR ResNet, or something cannot be built.
    """

    choose_by = "accuracy"

    def __init__(
        self, content: dict[str, Any], settings: PretrainSettings, device: torch.device, trusted: bool = True
    ) -> None:
        self.settings = settings
        self.data, batch_size = build_data(group_of(content, "data"), device, trusted)
        node = dict(group_of(content, "backbone"))
        if node.get("checkpoint") == checkpoints.RANDOM and "mean" in node:
            mean, std = pixel_statistics(self.data.validation)  # part of the training images, and not augmented
            node["mean"], node["std"] = node.get("mean") or mean, node.get("std") or std
        network: Any = build_backbone(node, self.data, device, trusted, seed=settings.seed)
        if not isinstance(network, CifarResNet):
            raise UserError(f"pretrain trains CIFAR ResNets, not {network.name}")
        self.network = network
        check_kernels(network, self.data.image_shape, How(settings.execution))
        self.learner: Pretrainer = build(
            "pretrain",
            group_of(content, "pretrain"),
            trusted,
            backbone=network,
            total_steps=settings.train.steps,
            seed=settings.seed,
        )
        self.source = Feed(self.data.train, batch_size, "shuffled", settings.seed)
        self.names = dict(backbone=network.name, data=self.data.name)
        self.greeting = f"{network.name} learns to classify the images of {self.data.name}"

    @property
    def trained_network(self) -> CifarResNet:
        return self.network

    def validate(self) -> dict[str, Any]:
        """Return the accuracy on validation images with all blocks, and with a random half of them."""
        return self.learner.accuracies(self.data.validation, way=self.settings.execution)

    def deployable(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test; write the backbone and the summary; close the tracker."""
        network, settings = self.network, self.settings
        network.load_state_dict(run.load_best_so_far())
        summary: dict[str, Any] = dict(
            command=run.command, **self.names, seed=settings.seed, steps=settings.train.steps
        )
        way = Execution(network.eval(), self.data.image_shape, settings.execution, as_it_is=True).way
        summary |= {"execution": way, "precision": settings.precision}
        summary |= {"seconds": round(seconds, 1), "hash": network.content_hash()}
        summary |= {
            f"test/{key}": value
            for key, value in self.learner.accuracies(self.data.test, way=settings.execution).items()
        }
        with run.generation() as new:
            run.deploy_best(new)
            checkpoints.save(network, new.folder / DEPLOYED)
            new.save_json("summary.json", summary)
        tracker.finish(summary, [], [run.folder / DEPLOYED, run.folder / "summary.json"], None)
        return summary

    def show(self, summary: dict[str, Any]) -> None:
        """Print the accuracies."""
        full, half = summary["test/accuracy"], summary["test/accuracy_half_the_blocks"]
        print(f"Test accuracy {100 * full:.2f} % with all blocks, {100 * half:.2f} % with a random half of them.")
