"""Where a comparison gets what run folders do not hold: decisions of older runs, and test images to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from policyskip.build import Setup, build_data
from policyskip.comparison.collect import Result
from policyskip.config import group_of
from policyskip.data import Images, batch_at
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.runs.folder import Run
from policyskip.tasks import dispatch as tasks


def decide_again(setup: Setup, run: Run) -> Decisions:
    """What a run decides on test images, from its folder.

    Raises:
        UserError: its folder is damaged.
    """
    print(f"deciding again: {run.folder}", flush=True)
    try:
        return tasks.decide_again(setup, run)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.folder} is damaged or not that of a train run: {error!r}") from error


class Pictures:
    """Test images of a run, read from the data that its configuration names, if they are those that it saw.

    Args:
        trust: build data by classes outside policyskip, which executes them.
    """

    def __init__(self, trust: bool = False) -> None:
        self.trust = trust
        self._known: dict[str, Images] = {}

    def __call__(self, result: Result, places: Sequence[int]) -> dict[int, Any]:
        """uint8 (H, W, 3) for each place.

        Raises:
            UserError: the data is not there, or is not what the run saw.
        """
        assert result.decisions is not None
        test = self._test(result)
        if test.fingerprint() != result.decisions.images:
            raise UserError(f"the {result.summary['data']} images that are here now are not those that the runs saw")
        found: dict[int, Any] = {}
        for part in torch.tensor(list(places)).split(64):
            shown = batch_at(test, part).images.permute(0, 2, 3, 1).cpu().numpy()
            found.update(zip(part.tolist(), shown, strict=True))
        return found

    def _test(self, result: Result) -> Images:
        key = result.decisions.images if result.decisions else ""
        if key not in self._known:
            node = {**group_of(result.config, "data")}
            if "download" in node:
                node["download"] = False  # a comparison is no reason to fetch anything
            try:
                data, _ = build_data(node, torch.device("cpu"), self.trust)
            except (KeyError, TypeError, AttributeError, OSError) as error:
                raise UserError(f"the data cannot be read: {error}") from error
            self._known[key] = data.test.plain()
        return self._known[key]
