"""An image runs through few of a network's blocks, and through more if the answer is not sure enough.

There is nothing to train: a pass is the frozen network itself with some of its blocks, and ends in the network's head.
Which blocks a pass keeps, and how sure an answer must be, is searched on validation images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from policyskip.agents.early_exit import ThresholdAgent
from policyskip.backbones import Backbone, ExitNetwork
from policyskip.backbones.passes import PassNetwork
from policyskip.data import Images
from policyskip.errors import UserError
from policyskip.exits.calibration import check_search
from policyskip.exits.pass_search import Answers, find_answers, search_passes
from policyskip.exits.rules import rule_named
from policyskip.static_front import Keep, keep_text


class Passes(ThresholdAgent):
    """The agent whose images run through their network in passes.

    Args:
        network: a frozen network with blocks.
        images: the validation images on which the keep-sets are searched.
        target: what the keep-sets are searched for; see :func:`~policyskip.exits.targets.choose_index`.
        seed: draws the images of the search, and those by which blocks are put in order.
        good: keep-sets that are known to be good, to try as well.
        passes: how many there are, 2 or 3.
        candidates: keep-sets that are tried, about.
        limit: validation images that the search uses, at most.
        rule, search: by which rule an image leaves, and how its thresholds are searched; see ``exits/calibration.py``.

    Raises:
        UserError: a value that is not allowed; a network that has exits or too few blocks, or that does not tolerate
            skipping; or no passes meet the target.
    """

    learns = False
    network: PassNetwork

    def __init__(
        self,
        network: Backbone | ExitNetwork,
        images: Images,
        target: dict[str, Any],
        seed: int,
        good: Sequence[Keep] = (),
        passes: int = 2,
        candidates: int = 200,
        limit: int = 2000,
        rule: str = "confidence",
        search: str = "quota",
    ) -> None:
        if not isinstance(network, Backbone):
            raise UserError(
                f"agent=passes skips the blocks of a network without exits (backbone=resnet32_digits), and "
                f"{network.name} has exits"
            )
        if passes not in (2, 3) or candidates < 2 or limit < 1:
            raise UserError(
                "agent.passes must be 2 or 3, agent.candidates at least 2 and agent.limit at least 1, "
                f"got {passes}, {candidates} and {limit}"
            )
        rule_named(rule)
        check_search(rule, search, passes)
        self.rule, self.search = rule, search
        started = time.monotonic()
        answers = find_answers(network.freeze(), images, candidates, limit, seed, good)
        if len(answers.sets) < passes:
            raise UserError(f"{network.name} has {network.num_blocks} blocks, too few for {passes} different passes")
        _check_tolerance(network, answers)
        self.network = PassNetwork(network, search_passes(answers, passes, target))
        self.search_seconds = time.monotonic() - started

    def update(self, source: Any) -> dict[str, float]:
        """Refuse to learn.

        Raises:
            UserError: always.
        """
        raise UserError("agent=passes has nothing to learn")

    def state_dict(self) -> dict[str, Any]:
        return {"sets": [keep_text(keep) for keep in self.network.sets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sets = [[mark == "1" for mark in keep] for keep in state["sets"]]
        self.network = PassNetwork(self.network.backbone, sets)


def _check_tolerance(network: Backbone, answers: Answers) -> None:
    """Refuse a network that answers much worse without some of its blocks, whichever they are.

    Raises:
        UserError: the best set of fewer blocks is nearer to chance than to the whole network.
    """
    accuracy_S = answers.correct_SM.double().mean(1)
    best, full, chance = float(accuracy_S[:-1].max()), float(accuracy_S[-1]), 1 / network.num_classes
    if best - chance < (full - chance) / 2:
        raise UserError(
            f"{network.name} does not tolerate skipping: the best of {len(accuracy_S) - 1} sets of fewer blocks "
            f"answers {100 * best:.1f} % of the validation images right, all {network.num_blocks} blocks "
            f"{100 * full:.1f} %; policyskip pretrain trains networks that do"
        )
