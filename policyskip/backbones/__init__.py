"""Networks whose blocks can be kept or skipped or that have several exits, how both are executed, what they cost."""

from policyskip.backbones.base import Backbone, Block, Network
from policyskip.backbones.branchynet import BranchyNet
from policyskip.backbones.builders import (
    branchy_alexnet,
    branchy_lenet,
    branchy_resnet,
    cifar_resnet_exits,
    load_exits,
    multi_scale_densenet,
    torchvision_resnet_exits,
)
from policyskip.backbones.checkpoints import cifar_resnet, load, load_checkpoint, torchvision_resnet
from policyskip.backbones.costs import Costs, count_costs
from policyskip.backbones.execution import dense, sparse, sparse_many
from policyskip.backbones.exits import ExitCosts, ExitNetwork, costly_exits, count_exit_costs, rows_of, run_until
from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.msdnet import MSDNet
from policyskip.backbones.resnet_exits import ResNetExits

__all__ = [
    "Backbone",
    "Block",
    "BranchyNet",
    "Costs",
    "ExitCosts",
    "ExitNetwork",
    "GatedNetwork",
    "MSDNet",
    "Network",
    "ResNetExits",
    "branchy_alexnet",
    "branchy_lenet",
    "branchy_resnet",
    "cifar_resnet",
    "cifar_resnet_exits",
    "costly_exits",
    "count_costs",
    "count_exit_costs",
    "dense",
    "load",
    "load_checkpoint",
    "load_exits",
    "multi_scale_densenet",
    "rows_of",
    "run_until",
    "sparse",
    "sparse_many",
    "torchvision_resnet",
    "torchvision_resnet_exits",
]
