"""Networks whose blocks can be kept or skipped, how they are executed, and what they cost."""

from policyskip.backbones.base import Backbone, Block
from policyskip.backbones.checkpoints import cifar_resnet, load, torchvision_resnet
from policyskip.backbones.costs import Costs, count_costs
from policyskip.backbones.execution import dense, sparse, sparse_many

__all__ = [
    "Backbone",
    "Block",
    "Costs",
    "cifar_resnet",
    "count_costs",
    "dense",
    "load",
    "sparse",
    "sparse_many",
    "torchvision_resnet",
]
