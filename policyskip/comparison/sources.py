"""Sources of what a comparison needs and run folders do not hold: the decisions of older runs, and test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policyskip.build import Setup, build_data
from policyskip.comparison.collect import Result
from policyskip.config import group_of
from policyskip.data import Images, batch_at
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.runs import stored_config
from policyskip.runs.folder import Run
from policyskip.tasks import dispatch


def decide_again(setup: Setup, run: Run) -> Decisions:
    """Let a run's saved policy decide for the test images once more.

    Args:
        setup: what the run's configuration names.
        run: its folder.

    Raises:
        UserError: the folder is damaged.
    """
    print(f"deciding again: {run.folder}", flush=True)
    return dispatch.judge(setup, run, "test", compared=False).decisions


class ExampleImages:
    """Loads test images of a run from the data that its configuration names.

    Args:
        trust: whether data may be built by classes outside policyskip, whose code is then executed.
        typed: keys of the group ``data`` that were typed, by group; they go before those of the configuration.
    """

    def __init__(self, trust: bool = False, typed: dict[str, Any] | None = None) -> None:
        self.trust, self.typed = trust, typed or {}
        self._loaded: dict[str, Images] = {}  # by fingerprint

    def __call__(self, result: Result, indices: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """Return the test images of these indices: uint8 (H, W, 3) each.

        Args:
            result: a run that has decisions.
            indices: of images in the test split.

        Raises:
            UserError: the data cannot be read, or are not the images that the run was judged on.
        """
        assert result.decisions is not None
        test = self._test(result)
        if test.fingerprint() != result.decisions.images:
            raise UserError(f"the {result.summary['data']} images that are here now are not those that the runs saw")
        images: dict[int, NDArray[np.uint8]] = {}
        for index_B in torch.tensor(list(indices)).split(64):
            image_BHWC = batch_at(test, index_B).images.permute(0, 2, 3, 1).cpu().numpy()
            images.update(zip(index_B.tolist(), image_BHWC, strict=True))
        return images

    def _test(self, result: Result) -> Images:
        """Return the test split of a run's data, without augmentation; runs with one fingerprint share one split.

        Raises:
            UserError: the data cannot be read.
        """
        fingerprint = result.decisions.images if result.decisions else ""
        if fingerprint not in self._loaded:
            data_group = {"data": group_of(result.config, "data")}
            node = stored_config.buildable(data_group, self.trust, {"data": self.typed.get("data", {})})["data"]
            if "download" in node and "download" not in self.typed.get("data", {}):
                node = {**node, "download": False}  # nobody expects a comparison to download data
            try:
                data, _ = build_data(node, torch.device("cpu"), self.trust)
            except (KeyError, TypeError, AttributeError, OSError) as error:
                raise UserError(f"the data cannot be read: {error}") from error
            self._loaded[fingerprint] = data.test.plain()
        return self._loaded[fingerprint]
