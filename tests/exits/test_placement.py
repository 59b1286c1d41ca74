"""CDL's admission by hand, and proposals against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch

from policyskip.errors import UserError
from policyskip.exits.placement import Stage, admit, propose_exits, stage_gain


def test_the_gain_of_a_stage_by_hand():
    """Six images leave and save 40 each, four pay 10 for nothing."""
    assert stage_gain(6, 4, saved_macs=40, head_macs=10) == 200


TRUNK, HEADS = torch.tensor([10.0, 20, 30, 40]), torch.tensor([5.0, 50, 5, 2])


def test_admission_by_hand():
    """Ten images, three candidates before the network's end.

    Stage 0: 4 leave. The rest of the network is 20 + 30 + 40 and its head 2: 92, less the head 87 saved by each, and 6 pay
    5: (4 · 87 - 6 · 5) / 10 = 31.8. Stage 1: of the 6 left, 3 leave; rest 72, less the head 22: (3 · 22 - 3 · 50) / 10 =
    -8.4, so it is not admitted and all 6 reach stage 2, where 5 leave: (5 · (42 - 5) - 1 · 5) / 10 = 18.
    """
    leave_MS = torch.zeros(10, 3, dtype=torch.bool)
    leave_MS[:4, 0] = True
    leave_MS[2:7, 1] = True
    leave_MS[4:9, 2] = True
    stages = admit(leave_MS, TRUNK, HEADS)
    assert [(s.resolved, s.passed, s.admitted) for s in stages] == [(4, 6, True), (3, 3, False), (5, 1, True)]
    assert [s.gain for s in stages] == pytest.approx([31.8, -8.4, 18.0])
    assert [s.admitted for s in admit(leave_MS, TRUNK, HEADS, epsilon=20)] == [True, False, False]
    # With stage 0 refused, all ten reach stage 1 and five leave: (5 · 22 - 5 · 50) / 10 = -14; then (5 · 37 - 5 · 5) / 10.
    later = admit(leave_MS, TRUNK, HEADS, epsilon=31.9)
    assert [s.gain for s in later] == pytest.approx([31.8, -14, 16])


def test_gains_add_up_to_the_macs_that_the_images_save():
    """The mean cost with the admitted heads is the cost without any head, minus the gains."""
    leave_MS = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    stages = admit(leave_MS, TRUNK, HEADS)
    assert {s.admitted for s in stages} == {True, False}
    cost = 0.0
    for leaves in leave_MS:
        for s, stage in enumerate(stages):
            cost += float(TRUNK[s]) + stage.admitted * float(HEADS[s])
            if stage.admitted and leaves[s]:
                break
        else:
            cost += float(TRUNK[-1] + HEADS[-1])
    assert cost / 50 == pytest.approx(102 - sum(s.gain for s in stages if s.admitted))


def test_a_head_where_no_image_leaves_or_that_gains_nothing_is_not_admitted():
    assert admit(torch.zeros(5, 1).bool(), torch.ones(2), torch.ones(2)) == [Stage(0, 5, -1.0, False)]
    even = admit(torch.tensor([[True], [False]]), torch.tensor([1.0, 1]), torch.ones(2))  # 1 · 1 - 1 · 1
    assert even == [Stage(1, 1, 0.0, False)]
    with pytest.raises(ValueError, match="1 stages take 2 trunk and head costs, got 3 and 2"):
        admit(torch.zeros(5, 1).bool(), torch.ones(3), torch.ones(2))


ACCURACY, MACS = [0.32, 0.55, 0.6, 0.58, 0.8, 0.85, 0.86], [1e6, 2e6, 3e6, 4.5e6, 5e6, 6e6, 9e6]


@pytest.mark.parametrize("number", range(1, 8))
def test_proposals_are_the_best_of_every_choice(number):
    """The area under the staircase of accuracy over MACs, by enumeration."""

    def area(blocks: tuple[int, ...]) -> float:
        steps = [0.1, *(ACCURACY[k] for k in blocks)]
        edges = [0, *(MACS[k] for k in blocks), 10e6]
        return sum(a * (high - low) for a, low, high in zip(steps, edges, edges[1:]))

    best = max(itertools.combinations(range(7), number), key=area)
    proposed = propose_exits(ACCURACY, MACS, 0.9, 10e6, number, chance=0.1)
    assert tuple(p.block for p in proposed) == best


def test_a_proposal_names_its_reason():
    """One exit: block 1 has area 0.1·2 + 0.55·8 = 4.6, block 4 0.1·5 + 0.8·5 = 4.5, block 2 4.5, the others less."""
    (one,) = propose_exits(ACCURACY, MACS, 0.9, 10e6, 1, chance=0.1)
    assert one.block == 1
    assert one.reason == (
        "after block 1: 55.0 % right at 0.20 of the full cost (the network: 90.0 %), "
        "+45.0 points for 2 million MACs more than a guess"
    )
    first, second = propose_exits(ACCURACY, MACS, 0.9, 10e6, 2, chance=0.1)
    assert (first.block, second.block) == (1, 4)
    assert second.reason.endswith("+25.0 points for 3 million MACs more than the exit before")


@pytest.mark.parametrize("number", [0, 8])
def test_too_many_exits_or_none_are_refused(number):
    with pytest.raises(UserError, match=f"from 1 to 7, the places there are, got {number}"):
        propose_exits(ACCURACY, MACS, 0.9, 10e6, number, chance=0.1)


def test_costs_that_do_not_rise_are_refused():
    with pytest.raises(ValueError, match="rising and below full_macs"):
        propose_exits(ACCURACY, MACS, 0.9, 8e6, 1, chance=0.1)
