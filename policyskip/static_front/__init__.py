"""The static front: the best that can be done with one keep-set for all images, at every cost."""

from policyskip.static_front.cache import front_file, known_front, remember
from policyskip.static_front.finding import find_front
from policyskip.static_front.front import StaticFront
from policyskip.static_front.proposals import spread_set
from policyskip.static_front.racing import least_budget, search
from policyskip.static_front.scoring import Keep, SetScorer, keep_text

__all__ = [
    "Keep",
    "SetScorer",
    "StaticFront",
    "find_front",
    "front_file",
    "keep_text",
    "known_front",
    "least_budget",
    "remember",
    "search",
    "spread_set",
]
