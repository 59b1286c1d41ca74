"""A Gaussian process predicts here how good a keep-set is, from the sets that were scored so far.

Scoring one set of a deep network on a few hundred images takes a second; predicting it takes a microsecond. So the
search scores the sets that are predicted to be good. The prediction for a set that was scored is worth having, too: it
is the score, drawn towards what similar sets reach, as far as chance may have made it high or low.

Shapes: F sets that were scored, P sets to predict, K blocks, D features of a set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_SETS = 300
"""The sets that a surrogate is fitted to, at most, because the work grows with their number cubed."""
LENGTHS = (0.08, 0.2, 0.5)
"""The distances tried, in shares of the blocks, over which two sets are still alike."""
SHARES = (0.2, 0.6)
"""The shares of the variance tried that are explained by single blocks, pairs of neighbours and the stages' sums; the
rest is explained by the distance between sets."""


class Surrogate:
    """Predicts the value of keep-sets.

    A set's value is a constant, plus a weight for each kept block, for each pair of blocks kept one after the other and
    for the number kept in each stage and its square (Bayesian ridge regression), plus what a smooth function of the
    set adds, which is alike for sets that differ in few blocks (a Gaussian process with an exponential kernel over
    the number of different blocks). Two parameters are chosen by the likelihood of the values.

    Args:
        keep_FK: bool (F, K), the sets that were scored.
        value_F: float (F,), their values.
        noise_F: float (F,), the variance of each value that is due to the choice of images.
        stages: number of blocks in each stage.
    """

    def __init__(self, keep_FK: Tensor, value_F: Tensor, noise_F: Tensor, stages: Sequence[int]) -> None:
        self.stages, self.keep_FK = tuple(stages), keep_FK.double()
        self.features_FD = self._features(self.keep_FK)
        self.trend_D = _ridge(self.features_FD[:, -self._trend_size :], value_F.double())
        residual_F = value_F.double() - self.features_FD[:, -self._trend_size :] @ self.trend_D
        variance = max(residual_F.var(correction=0).item(), 1e-12)
        best = -torch.inf
        different_FF, alike_FF = self._compared(self.keep_FK, self.features_FD)
        noise_FF = torch.diag(noise_F + 1e-3 * variance)
        for length in LENGTHS:
            smooth_FF = torch.exp(-different_FF / length)
            for share in SHARES:
                covariance_FF = variance * (share * alike_FF + (1 - share) * smooth_FF) + noise_FF
                factor_FF, failed = torch.linalg.cholesky_ex(covariance_FF)
                if failed:
                    continue
                weight_F = torch.cholesky_solve(residual_F.unsqueeze(1), factor_FF).squeeze(1)
                likelihood = -0.5 * residual_F @ weight_F - factor_FF.diagonal().log().sum()
                if likelihood > best:
                    best, chosen = likelihood.item(), (length, share, weight_F)
        assert best > -torch.inf, "a covariance with noise on its diagonal has a Cholesky factor"
        self.length, self.share, weight_F = chosen
        self.weight_F = (variance * weight_F).float()  # predicting is most of the work, and needs no more digits
        self.keep_FK, self.features_FD, self.trend_D = (
            self.keep_FK.float(),
            self.features_FD.float(),
            self.trend_D.float(),
        )

    @property
    def _trend_size(self) -> int:
        return 1 + 2 * len(self.stages)

    def _features(self, keep_PK: Tensor) -> Tensor:
        """Return what the linear part sees of each set, float (P, D); the trend's columns come last."""
        pair_PK = keep_PK[:, 1:] * keep_PK[:, :-1]
        counts = torch.stack(
            [part.sum(1) / part.shape[1] for part in keep_PK.split(self.stages, 1) if part.shape[1]], 1
        )
        missing = keep_PK.new_zeros(len(keep_PK), len(self.stages) - counts.shape[1])
        counts = torch.cat([counts, missing], 1)
        return torch.cat([keep_PK, pair_PK, keep_PK.new_ones(len(keep_PK), 1), counts, counts**2], 1)

    def _compared(self, keep_PK: Tensor, features_PD: Tensor) -> tuple[Tensor, Tensor]:
        """Compare sets with those that were scored: the share of the blocks in which they differ, (P, F), and how alike
        the features of the linear part are, (P, F), from -1 to 1."""
        K = self.keep_FK.shape[1]
        differ_PF = keep_PK.sum(1, keepdim=True) + self.keep_FK.sum(1) - 2 * keep_PK @ self.keep_FK.T
        size = self.features_FD.shape[1] - self._trend_size
        alike_PF = (2 * features_PD[:, :size] - 1) @ (2 * self.features_FD[:, :size] - 1).T / size
        return differ_PF.clamp(min=0) / K, alike_PF

    def predict(self, keep_PK: Tensor) -> Tensor:
        """Return the expected value of each set, float32 (P,), for bool (P, K)."""
        features_PD = self._features(keep_PK.float())
        trend_P = features_PD[:, -self._trend_size :] @ self.trend_D
        different_PF, alike_PF = self._compared(keep_PK.float(), features_PD)
        covariance_PF = self.share * alike_PF + (1 - self.share) * torch.exp(-different_PF / self.length)
        return trend_P + covariance_PF @ self.weight_F


def _ridge(x_FD: Tensor, y_F: Tensor, strength: float = 1e-2) -> Tensor:
    """Return the weights (D,) of a ridge regression of ``y_F`` on ``x_FD``."""
    square_DD = x_FD.T @ x_FD + strength * torch.eye(x_FD.shape[1], dtype=x_FD.dtype)
    solution: Tensor = torch.linalg.solve(square_DD, x_FD.T @ y_F)
    return solution
