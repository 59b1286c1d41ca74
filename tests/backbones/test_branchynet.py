"""BranchyNet's networks: costs and sizes against the original code's, and its pooling and normalisation by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policyskip.backbones import count_exit_costs
from policyskip.backbones.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet, max_pool, response_norm
from policyskip.errors import UserError
from tests.conftest import small_images

MNIST, CIFAR, DIGITS = (3, 28, 28), (3, 32, 32), (3, 20, 20)


def linear_inputs(network: nn.Module) -> list[int]:
    return [module.in_features for module in network.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("network", "shape", "millions", "plain", "linear"),
    [
        (BranchyLeNet(10, MNIST, channels=1), MNIST, [0.220, 1.248], 1.140, [640, 720, 84]),
        (BranchyAlexNet(10, CIFAR), CIFAR, [17.34, 21.32, 30.47], 28.25, [512, 128, 1024, 256, 128]),
        (BranchyResNet(10, CIFAR), CIFAR, [48.60, 127.54, 284.91], 232.41, [28800, 14400, 576]),
    ],
    ids=["B-LeNet", "B-AlexNet", "B-ResNet-110"],
)
def test_the_original_networks(network, shape, millions, plain, linear):
    """Cumulative MACs, MACs without branches, and the inputs of the linear layers, which follow from all sizes before."""
    assert linear_inputs(network) == linear
    costs = count_exit_costs(network, shape)
    assert (costs.cumulative_N / 1e6).tolist() == pytest.approx(millions, rel=0.003)
    assert costs.straight_N[-1].item() / 1e6 == pytest.approx(plain, rel=0.003)


def test_parameters_of_lenet_by_hand():
    trunk = (5 * 25 + 5) + (10 * 5 * 25 + 10) + (20 * 10 * 25 + 20) + (720 * 84 + 84) + (84 * 10 + 10)
    branch = (10 * 5 * 9 + 10) + (640 * 10 + 10)
    assert sum(p.numel() for p in BranchyLeNet(10, MNIST, channels=1).parameters()) == trunk + branch


def test_the_grey_lenet_sees_the_mean_of_the_colours():
    network = BranchyLeNet(10, DIGITS, channels=1).eval()
    images = small_images(3, size=20).images / 255
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(network(images), network(grey))
        by_hand = network.segments[0][1](images.mean(1, keepdim=True))  # pixels in [0, 1], no other normalisation
        torch.testing.assert_close(network.segment(0, network.begin(images))["x"], by_hand)


def test_the_depth_of_a_b_resnet_is_that_of_its_trunk():
    for depth in (8, 32):
        blocks = [len(segment) for segment in BranchyResNet(10, DIGITS, depth).segments[1:]]
        assert blocks == [(depth - 2) // 6, (depth - 2) // 3]


@pytest.mark.parametrize("shape", [DIGITS, CIFAR, (3, 17, 23)])
def test_images_of_other_sizes(shape):
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    for network in (BranchyLeNet(7, shape), BranchyAlexNet(7, shape), BranchyResNet(7, shape, 8)):
        with torch.no_grad():
            assert network.eval()(images).shape == (2, network.num_exits, 7)


def test_pools_count_windows_that_hang_over_the_edge():
    x = torch.arange(25.0).view(1, 1, 5, 5)
    assert max_pool(2)(x).flatten().tolist() == [6, 8, 9, 16, 18, 19, 21, 23, 24]
    assert max_pool(3)(torch.zeros(1, 1, 32, 32)).shape[2:] == (16, 16)
    assert max_pool(3)(torch.zeros(1, 1, 4, 4)).shape[2:] == (2, 2)


def test_response_normalisation_by_hand():
    """Channels 100, 200, 300, 400: each divided by (2 + 5e-5 · the squares of itself and its neighbours)^0.75."""
    x = torch.tensor([100.0, 200.0, 300.0, 400.0]).view(1, 4, 1, 1)
    squares = torch.tensor([1 + 4, 1 + 4 + 9, 4 + 9 + 16, 9 + 16]) * 1e4
    expected = x.flatten() / (2 + 5e-5 * squares) ** 0.75
    torch.testing.assert_close(response_norm()(x).flatten(), expected)


def test_dropout_is_only_for_training():
    network, images = BranchyAlexNet(5, DIGITS), small_images(2, size=20).images
    with torch.no_grad():
        assert not torch.equal(network.train()(images)[:, 2], network(images)[:, 2])
        assert torch.equal(network.eval()(images), network(images))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BranchyResNet(10, CIFAR, 100), "depth must be 6n.2 .* got 100"),
        (lambda: BranchyResNet(10, CIFAR, 2), "depth must be 6n.2 .* got 2"),
        (lambda: BranchyLeNet(10, MNIST, 2), r"channels must be 1 \(grey\) or 3, got 2"),
        (lambda: BranchyAlexNet(10, (3, 8, 8)), "images of 8×8 are too small for this network"),
        (lambda: BranchyResNet(10, (3, 2, 2), 8), "images of 2×2 are too small"),
    ],
)
def test_an_impossible_network_is_refused(build, message):
    with pytest.raises(UserError, match=message) as refused:
        build()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [BranchyLeNet, BranchyAlexNet, BranchyResNet])
def test_pixels_are_normalised_by_the_mean_and_deviation_given(kind):
    network = kind(10, CIFAR, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    torch.testing.assert_close(network.begin(white)["x"][0, :, 0, 0], torch.tensor([1.8, 3.2, 3.5]))
