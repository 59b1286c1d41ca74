"""Rewards are small callables that turn the outcome of decisions into a number for each decision.

A reward is any callable ``(Outcome) -> float tensor (B,)``. To use your own, put a class in a file
of the current folder and say ``reward._target_=my_rewards.Mine``; nothing here needs to change.

Shapes: B decisions (one for each image, or S for each image laid end to end), K blocks, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.errors import UserError, named
from policyskip.finite import described, repr_of, unusual
from policyskip.parallel.deferred import Figure, deferred_on, sent
from policyskip.texts import one_line


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome of B decisions.

    Attributes:
        logits_BC: float (B, C), the network's logits with only the kept blocks run.
        label_B: int64 (B,), the true classes.
        correct_B: bool (B,), whether the top class is the label.
        keep_BK: bool (B, K), the blocks that ran; of a network with N exits, (B, N), the segments that ran.
        macs_B: float64 (B,), multiply-accumulates (MACs) that the network spent, without the policy's own.
        full_macs: MACs of the whole network.
    """

    logits_BC: Tensor
    label_B: Tensor
    correct_B: Tensor
    keep_BK: Tensor
    macs_B: Tensor
    full_macs: float

    @property
    def kept_fraction_B(self) -> Tensor:
        """Return the share of the K blocks that ran, float32 (B,) in [0, 1]."""
        return self.keep_BK.float().mean(1)

    @property
    def macs_fraction_B(self) -> Tensor:
        """Return the share of the whole network's MACs that was spent, float32 (B,) in [0, 1]."""
        return (self.macs_B / self.full_macs).float()


LARGEST = 1e30
"""The largest weight of a reward: a reward that it multiplies is still finite in float32."""

Reward = Callable[[Outcome], Tensor]
"""From an outcome of B decisions to the reward of each, float (B,)."""


@runtime_checkable
class Adaptive(Protocol):
    """The protocol of a reward that changes while an agent learns, as :class:`Budget` does."""

    def adapt(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Change the reward after an update with these figures (``macs_fraction``, …), and return figures to log.

        The figures are numbers. A reward with an attribute ``takes_tensors``, which is true, may get tensors of shape
        () on a GPU instead, and return such: so the update does not wait for the GPU.
        """
        ...

    def selection_score(self, figures: dict[str, float]) -> float:
        """Return the score of validation figures by which the best weights are chosen while the reward itself moves."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return the numbers from which the reward can continue."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        ...


def check_weight(key: str, value: float) -> None:
    """Refuse a weight of a reward that float32 cannot hold, or that is no number.

    Raises:
        UserError: naming the key and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise UserError(
            f"reward.{key} must be a number from -{LARGEST:.0e} to {LARGEST:.0e}, got {one_line(repr(value), 60)}"
        )


def unless_wrong(used_B: Tensor, outcome: Outcome, penalty: float) -> Tensor:
    """Return ``1 - used²`` where the prediction is right and ``-penalty`` where it is wrong, float (B,).

    Args:
        used_B: float (B,), the share of the whole that was used, in [0, 1].
    """
    return torch.where(outcome.correct_B, 1 - used_B**2, torch.full_like(used_B, -penalty))


@dataclass(frozen=True)
class Utilization:
    """The reward of BlockDrop (Wu et al. 2018), which is ``1 - (|u|/K)²`` if the prediction is right, ``-penalty`` if
    not, where |u| of the K blocks ran.

    Raises:
        UserError: ``penalty`` is not finite, or too large.
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        check_weight("penalty", self.penalty)

    def __call__(self, outcome: Outcome) -> Tensor:
        return unless_wrong(outcome.kept_fraction_B, outcome, self.penalty)


@dataclass(frozen=True)
class Macs:
    """A reward like :class:`Utilization` that takes the share of MACs spent in place of that of blocks that ran.

    Raises:
        UserError: ``penalty`` is not finite, or too large.
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        check_weight("penalty", self.penalty)

    def __call__(self, outcome: Outcome) -> Tensor:
        return unless_wrong(outcome.macs_fraction_B, outcome, self.penalty)


@dataclass(frozen=True)
class Linear:
    """A reward that is SkipNet's trade-off: minus the cross-entropy (nats), minus ``weight`` times the MACs' share.

    Raises:
        UserError: ``weight`` is not finite, or too large.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)

    def __call__(self, outcome: Outcome) -> Tensor:
        loss = F.cross_entropy(outcome.logits_BC, outcome.label_B, reduction="none")
        return -loss - self.weight * outcome.macs_fraction_B


class Latency:
    """A reward like :class:`Utilization` that takes the share of measured time in place of that of blocks that ran.

    The time of a decision is that of stem and head, of the blocks that run, and of the shortcuts of those that do not.

    Args:
        table: the file that ``policyskip profile`` wrote.
        penalty: what a wrong prediction costs.
        batch_size: the batch size whose times are used; None is the largest in the table.

    Raises:
        UserError: the table cannot be read, or has no such batch size, or ``penalty`` is not finite or too large.
    """

    def __init__(self, table: str, penalty: float = 1.0, batch_size: int | None = None) -> None:
        check_weight("penalty", penalty)
        try:
            batches = json.loads(Path(table).read_text(encoding="utf-8"))["batches"]
            size = str(max(map(int, batches)) if batch_size is None else batch_size)
            if size not in batches:
                raise UserError(f"{table} has no times for batches of {size}; it has {', '.join(batches)}")
            times = batches[size]
            self.always_ms = float(times["always_ms"])
            self.kept_ms_K, self.dropped_ms_K = (
                torch.tensor(times[key], dtype=torch.float64) for key in ("kept_ms", "dropped_ms")
            )
            if self.kept_ms_K.dim() != 1 or self.kept_ms_K.shape != self.dropped_ms_K.shape:
                raise ValueError("kept_ms and dropped_ms must be two lists of one length")
            every_ms = torch.cat([torch.tensor([self.always_ms]), self.kept_ms_K, self.dropped_ms_K])
            if not (every_ms.isfinite() & (every_ms >= 0)).all() or self.always_ms + self.kept_ms_K.sum() == 0:
                raise ValueError("its times must be finite and not negative, and not all 0")
        except OSError as error:
            hint = f"`policyskip profile output={table}` makes it"
            raise UserError(f"reward.table={table} cannot be read; {hint}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{table} is no table of `policyskip profile`: {error}") from error
        self.penalty = penalty

    def milliseconds(self, keep_BK: Tensor) -> Tensor:
        """Return the time that each decision, bool (B, K), takes for one image, in milliseconds, float64 (B,).

        Raises:
            UserError: the table is of a network with another number of blocks.
        """
        kept_ms_K, dropped_ms_K = sent(self.kept_ms_K, keep_BK.device), sent(self.dropped_ms_K, keep_BK.device)
        if keep_BK.shape[1] != len(kept_ms_K):
            raise UserError(f"the table of reward=latency has {len(kept_ms_K)} blocks, the network {keep_BK.shape[1]}")
        return self.always_ms + dropped_ms_K.sum() + keep_BK.double() @ (kept_ms_K - dropped_ms_K)

    def __call__(self, outcome: Outcome) -> Tensor:
        whole = self.milliseconds(torch.ones_like(outcome.keep_BK[:1]))
        used = (self.milliseconds(outcome.keep_BK) / whole).float()
        return unless_wrong(used, outcome, self.penalty)


class Budget:
    """A reward that is 1 for a right prediction, minus a price times the share of MACs spent. The price moves until the
    mean share is ``target``.

    This solves a constrained problem, the highest accuracy at a given mean cost, by its Lagrangian. After each update
    the training loop calls :meth:`adapt`, with the update's mean share of MACs. The price is a multiplier in [0, 10],
    ``multiplier ← multiplier + rate · (share − target)``, plus ``gain · (share − target)``, and at least 0. The second
    term reacts at once, so that a policy that follows slowly is not driven far past the target (Stooke, Achiam, Abbeel,
    ICML 2020, the P and I of their PID).

    Args:
        target: the mean share of the whole network's MACs, the policy's own included, in (0, 1).
        rate: how fast the multiplier moves.
        gain: how strongly the price reacts to the share of the last update.
        multiplier: the first value of the multiplier.

    Raises:
        UserError: ``target`` is not between 0 and 1, ``multiplier`` not in [0, 10], or ``rate`` or ``gain`` is negative
            or above 1000, or ``rate`` 0.
    """

    takes_tensors = True

    def __init__(self, target: float, rate: float = 0.05, gain: float = 2.0, multiplier: float = 0.2) -> None:
        for key, value in {"target": target, "rate": rate, "gain": gain, "multiplier": multiplier}.items():
            check_weight(key, value)
        if not (0 < target < 1 and 0 < rate <= 1e3 and 0 <= gain <= 1e3 and 0 <= multiplier <= 10):  # no NaN either
            raise UserError(
                f"reward.target must be above 0 and below 1, reward.rate positive, reward.gain not negative, neither "
                f"above 1000, and reward.multiplier from 0 to 10; got {target}, {rate}, {gain} and {multiplier}"
            )
        self.target, self.rate, self.gain = target, rate, gain
        self.multiplier: Figure = multiplier
        self.excess: Figure = 0.0

    @property
    def price(self) -> Figure:
        """Return the price that an image pays for all MACs of the whole network."""
        return _between(self.multiplier + self.gain * self.excess, 0.0)

    def __call__(self, outcome: Outcome) -> Tensor:
        return outcome.correct_B.float() - self.price * outcome.macs_fraction_B

    def adapt(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Move the price; ``figures`` has no ``macs_fraction`` as long as no episode has ended.

        Returns: the new multiplier and price, to log.
        """
        self.excess = figures.get("macs_fraction", self.target) - self.target
        moved = self.multiplier + self.rate * self.excess
        self.multiplier = _between(moved, 0.0, 10.0)  # a target out of reach must not raise it without end
        return {"multiplier": self.multiplier, "price": self.price}

    def selection_score(self, figures: dict[str, float]) -> float:
        """Return the accuracy, minus 10 times the distance of ``macs_fraction`` from the target beyond 0.005."""
        return figures["accuracy"] - 10 * max(0.0, abs(figures["macs_fraction"] - self.target) - 0.005)

    def state_dict(self) -> dict[str, float]:
        return {"multiplier": float(self.multiplier), "excess": float(self.excess)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.multiplier, self.excess = state["multiplier"], state["excess"]


def _between(number: Figure, least: float, most: float = math.inf) -> Figure:
    """Return a number, or the nearest between two others."""
    return number.clamp(least, most) if isinstance(number, Tensor) else min(max(number, least), most)


def reward_of(reward: Reward, outcome: Outcome) -> Tensor:
    """Compute ``reward(outcome)``, float32 (B,), without gradients, and check it.

    Raises:
        UserError: the reward raised an exception, or returned something other than a finite float tensor (B,). The
            message names the reward and what it returned.
    """
    name = one_line(getattr(reward, "__name__", type(reward).__name__), 80)
    try:
        reward_B = reward(outcome)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the reward {name} raised {one_line(named(error))}") from error
    expected = f"a float tensor of shape {tuple(outcome.correct_B.shape)}"
    if not isinstance(reward_B, Tensor):
        raise UserError(f"the reward {name} must return {expected}, not {one_line(repr_of(reward_B), 80)}")
    if (kind := unusual(reward_B)) is not None:
        raise UserError(f"the reward {name} must return {expected}, not a {kind} one")
    if reward_B.shape != outcome.correct_B.shape or not reward_B.is_floating_point():
        raise UserError(f"the reward {name} must return {expected}, not {described(reward_B, ' of shape')}")
    single_B = reward_B.detach().float()  # in which a number beyond 3.4e38 is infinite
    if (deferred := deferred_on(single_B.device)) is not None:
        deferred.note({f"the reward {name} returned numbers that are not finite": single_B})
        return single_B.to(outcome.keep_BK.device)
    finite_B = torch.isfinite(single_B)
    if not finite_B.all():
        bad = reward_B[~finite_B]
        raise UserError(
            f"the reward {name} returned {len(bad)} non-finite values of {len(reward_B)}, such as {bad[0]:.4g}"
            + ("" if not bad[0].isfinite() else ", which float32 cannot hold")
        )
    return single_B.to(outcome.keep_BK.device)
