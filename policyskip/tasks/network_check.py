"""A frozen network is tried on validation images before anything is learned over it.

Weights fit a network by their shapes alone. With classes in another order, another normalisation or another shortcut
than it was trained with, a network loads and answers wrongly; this is where that is noticed.

Shapes: B images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones import Network
from policyskip.backbones.architectures import RANDOM
from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, evaluation_mode
from policyskip.backbones.resnet import CifarResNet
from policyskip.backbones.translation import CIFAR_MEAN, CIFAR_STD
from policyskip.build import Setup
from policyskip.config import group_of
from policyskip.data import batch_at, spread_indices
from policyskip.errors import UserError
from policyskip.texts import one_line, percent

FIRST, MOST = 64, 500
"""Validation images that are looked at first, and at most, where these few leave a doubt."""
CHANCE = 0.01
"""The probability of so many right answers by chance below which a network is taken to know its classes."""
MUCH_BELOW_CHANCE = 1e-4
"""The same for another choice of settings, of which many are tried."""
FAR_BELOW = 0.2
"""How far an accuracy may be below what the network's file says."""
NORMALISATIONS = ((IMAGENET_MEAN, IMAGENET_STD), (CIFAR_MEAN, CIFAR_STD), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
CAUSES = "the order of the classes (folders are in the order of their names), the normalisation or the shortcut"


def network_warnings(setup: Setup) -> list[str]:
    """Return warnings about a frozen network that answers validation images at chance, or far below what its file says.

    A network of random weights that was asked for is not tried.
    """
    if group_of(setup.config, "backbone").get("checkpoint") == RANDOM or len(setup.data.classes) < 2:
        return []
    network: Network = setup.backbone
    inner: Network = getattr(network, "backbone", network)
    with torch.random.fork_rng(devices=[]):  # a reader of files may draw random numbers
        images, label_B = _validation(setup, FIRST)
        answer_B = _answers(network, images, setup)
        clear = _by_chance(answer_B, label_B) < 1e-6 and not _far_below(answer_B, label_B, inner.stated_accuracy)
        if clear and not inner.remark:
            return []
        if not clear:
            images, label_B = _validation(setup, MOST)
            answer_B = _answers(network, images, setup)
        return _judged(setup, network, images, label_B, answer_B)


def remark(network: Network) -> str:
    """Return as what a file that others made was read, or an empty text."""
    inner: Network = getattr(network, "backbone", network)
    return inner.remark


def _judged(setup: Setup, network: Network, images: Tensor, label_B: Tensor, answer_B: Tensor) -> list[str]:
    """Return warnings about a network, given what it answers to some images."""
    inner: Network = getattr(network, "backbone", network)
    accuracy, count, classes = _share(answer_B, label_B), len(label_B), setup.data.classes
    stated = inner.stated_accuracy
    found = f"{network.name} answers {percent(accuracy)} of {count} validation images rightly"
    best, better = _better_order(answer_B, label_B, setup)
    if not better:
        best, better = _better_choice(inner, images, label_B, accuracy, setup)
    hint = f"; {better}" if better else ""
    if _by_chance(answer_B, label_B) > CHANCE and _could_be_told(answer_B, label_B):
        reordered = _reordered(answer_B, label_B, len(classes))
        if reordered > max(best, 0.5) and count >= 10 * len(classes):
            names = one_line(", ".join(classes[:4]), 80)
            would_be = f"with the classes in another order it would be {percent(reordered)}"
            hint = f"; {would_be}: look at their names ({names}, …)"
        by_chance = accuracy < 1.5 * _rate(answer_B, label_B)
        even = "which is chance" if by_chance else "which so few images do not tell from chance"
        untrained = "" if inner.remark else "it is hardly trained, or "
        return [f"{found}, {even}: {untrained}{CAUSES} are others than it was trained with{hint}"]
    if stated is not None and _far_below(answer_B, label_B, stated):
        return [f"{found}, and its file says {percent(stated)}: {CAUSES} may be others than it was trained with{hint}"]
    return [f"{found}, as its file was read; {better}"] if better else []


def _validation(setup: Setup, count: int) -> tuple[Tensor, Tensor]:
    """Return validation images, uint8 (B, 3, H, W), spread over the set, and their labels, int64 (B,)."""
    images = setup.data.validation.plain()
    batch = batch_at(images, spread_indices(count, len(images)))
    return batch.images, batch.label_B.to(setup.device)


@torch.no_grad()
def _answers(network: Network, images: Tensor, setup: Setup) -> Tensor:
    """Return the classes, int64 (B,), that a network answers for images, at its last exit if it has several."""
    with evaluation_mode(network):
        logits = [network(part.to(setup.device)) for part in images.split(setup.batch_size)]
    return torch.cat([part if part.dim() == 2 else part[:, -1] for part in logits]).argmax(1)


def _share(answer_B: Tensor, label_B: Tensor) -> float:
    return (answer_B == label_B).double().mean().item() if len(label_B) else 0.0


def _rate(answer_B: Tensor, label_B: Tensor) -> float:
    """Return the share of right answers that is expected if answers have nothing to do with labels.

    It is 1/C for answers and labels that are spread evenly, and more where a class is frequent in both.
    """
    C = int(torch.stack([answer_B.max(), label_B.max()]).max()) + 1
    counts = [torch.bincount(x, minlength=C).double() / len(x) for x in (answer_B, label_B)]
    return float((counts[0] * counts[1]).sum())


def _by_chance(answer_B: Tensor, label_B: Tensor) -> float:
    """Return the probability of as many right answers or more, if answers have nothing to do with labels."""
    return (
        1.0
        if not len(label_B)
        else upper_tail(int((answer_B == label_B).sum()), len(label_B), _rate(answer_B, label_B))
    )


def _could_be_told(answer_B: Tensor, label_B: Tensor) -> bool:
    """Return whether so few images could show that a network is better than chance, if all answers were right."""
    return len(label_B) > 0 and _rate(label_B, label_B) ** len(label_B) < CHANCE


def _far_below(answer_B: Tensor, label_B: Tensor, stated: float | None) -> bool:
    """Return whether the accuracy is significantly, and by far, below a stated one."""
    if stated is None or not len(label_B) or _share(answer_B, label_B) >= stated - FAR_BELOW:
        return False
    wrong = int((answer_B != label_B).sum())
    return upper_tail(wrong, len(label_B), 1 - stated) < CHANCE


def upper_tail(successes: int, trials: int, rate: float) -> float:
    """Return the probability of that many successes or more in independent trials, each with this rate."""
    rate = min(max(rate, 0.0), 1.0)
    return math.fsum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(successes, trials + 1))


def _reordered(answer_B: Tensor, label_B: Tensor, classes: int) -> float:
    """Return the share of right answers if each answered class stood for the label that it is given most often to."""
    count_CC = torch.bincount(answer_B * classes + label_B, minlength=classes * classes).view(classes, classes)
    return float(count_CC.max(1).values.sum()) / max(1, len(label_B))


def _better_order(answer_B: Tensor, label_B: Tensor, setup: Setup) -> tuple[float, str]:
    """Return how many images are answered rightly if the class folders are taken in the other order, and how to say so.

    Returns: a share and a line; 0 and no line if the other order is no better, or there is no other.
    """
    names, order = setup.data.classes, setup.config.get("data", {}).get("class_order")
    if order is None or not all(name.isdecimal() for name in names):
        return 0.0, ""
    other = "text" if order == "numbers" else "numbers"
    by_other = sorted(names, key=int) if other == "numbers" else sorted(names)
    place_C = torch.tensor([names.index(name) for name in by_other], device=answer_B.device)
    other_B = place_C[answer_B]
    share = _share(other_B, label_B)
    if share <= _share(answer_B, label_B) + 0.1 or _by_chance(other_B, label_B) > MUCH_BELOW_CHANCE:
        return 0.0, ""
    return share, f"with data.class_order={other} it would be {percent(share)}"


def _better_choice(
    network: Network, images: Tensor, label_B: Tensor, accuracy: float, setup: Setup
) -> tuple[float, str]:
    """Return how many images another shortcut or normalisation answers rightly, and which one it is.

    Returns: a share and a line; 0 and no line if no other answers far more of them.
    """
    best, choice = 0.0, ""
    images, label_B = images[:: max(1, len(images) // 100)], label_B[:: max(1, len(images) // 100)]
    for changes, other in _alternatives(network):
        answer_B = _answers(other.to(setup.device), images, setup)
        share = _share(answer_B, label_B)
        if share > max(best, accuracy + 0.1) and _by_chance(answer_B, label_B) < MUCH_BELOW_CHANCE:
            typed = " ".join(f"backbone.{key}={_typed(value)}" for key, value in changes.items())
            best, choice = share, f"with {typed} it would be {percent(share)}"
    return best, choice


def _alternatives(network: Network) -> Iterator[tuple[dict[str, Any], Network]]:
    """Yield networks of the same weights with another shortcut or normalisation, and what is changed."""
    if not isinstance(network, CifarResNet):
        return
    own = network.architecture
    weights = {name: value for name, value in network.state_dict().items() if name not in ("mean", "std")}
    for shortcut in ("A", "pool") if own["shortcut"] != "B" else ("B",):
        for mean, std in ((tuple(own["mean"]), tuple(own["std"])), *NORMALISATIONS):
            chosen = {"shortcut": shortcut, "mean": list(mean), "std": list(std)}
            changes = {key: value for key, value in chosen.items() if value != own[key]}
            if changes:
                try:
                    other = CifarResNet(**{**own, **chosen})
                    other.load_state_dict(weights, strict=False)
                except (UserError, RuntimeError):  # a network that was changed after it was made
                    return
                yield changes, other


def _typed(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
