"""Passes: the same answers as the fixed sets give alone, nothing shared computed twice, and costs that add up."""

from __future__ import annotations

import pytest
import torch

from policyskip.backbones import PassNetwork, count_costs, count_exit_costs, load_exits, run_until
from policyskip.backbones.checkpoints import save
from policyskip.backbones.folding import folded
from policyskip.errors import UserError
from tests.conftest import small_backbone

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SHAPE = (3, 12, 12)
SETS = [(1, 0, 0, 0, 1, 0), (1, 0, 1, 1, 1, 0), (1, 0, 0, 1, 1, 1)]  # pass 2 forks after block 2, pass 3 after block 3


def passes(sets: list[tuple[int, ...]] = SETS, shortcut: str = "pool") -> PassNetwork:
    return PassNetwork(small_backbone(shortcut=shortcut), sets)


def alone(network: PassNetwork, keep: tuple[int, ...], images: torch.Tensor) -> torch.Tensor:
    return network.backbone(images, torch.tensor([keep]).bool().expand(len(images), -1)).log_softmax(1)


@pytest.mark.parametrize("shortcut", ["pool", "B"])
def test_exits_answer_with_the_mean_of_what_the_sets_say_alone(images, shortcut):
    network = passes(shortcut=shortcut)
    said = [alone(network, keep, images) for keep in SETS]
    expected = torch.stack([said[0], (said[0] + said[1]) / 2, (said[0] + said[1] + said[2]) / 3], dim=1)
    for executed in (network, folded(network)):
        with torch.no_grad():
            logits_BNC = executed(images)
            assert torch.allclose(logits_BNC, expected, **TOLERANCE)
            fixed_BFC = executed.fixed_logits(images, logits_BNC)
        assert torch.allclose(fixed_BFC[:, 0], said[1], **TOLERANCE)
        assert torch.allclose(fixed_BFC[:, 1], said[2], **TOLERANCE)
        assert torch.allclose(fixed_BFC[:, 2], network.backbone(images), **TOLERANCE)
    assert network.fixed_names == ("pass 2 alone (4 blocks)", "pass 3 alone (4 blocks)", "all 6 blocks")


def test_what_passes_share_runs_once_and_only_for_images_that_go_on(images):
    network, ran = passes(), dict.fromkeys(range(6), 0)
    for k, block in enumerate(network.backbone.blocks):
        block.residual.register_forward_pre_hook(lambda module, inputs, k=k: ran.update({k: ran[k] + len(inputs[0])}))
    stays = torch.tensor([False, True, True, False, True, False, False])
    with torch.no_grad():
        logits_BC, exit_B = run_until(network, images, lambda n, logits, rows: ~stays[rows] if n == 0 else rows == 1)
        whole = network(images)
    assert exit_B.tolist() == [0, 1, 2, 0, 2, 0, 0]
    assert torch.allclose(logits_BC, whole[torch.arange(7), exit_B], **TOLERANCE)
    once = {0: 7, 1: 0, 2: 7, 3: 2 * 7, 4: 3 * 7, 5: 7}  # forward: block 0 once for three passes, block 4 three times
    gone_on = {0: 7, 1: 0, 2: 3, 3: 3 + 2, 4: 7 + 3 + 2, 5: 2}
    assert ran == {k: once[k] + gone_on[k] for k in range(6)}


def test_costs_by_hand():
    network = passes()
    blocks, exits = count_costs(network.backbone, SHAPE), count_exit_costs(network, SHAPE)
    b, head = blocks.block_K.tolist(), 16 * 5  # the last features have 4 · 4 channels, there are 5 classes
    first = blocks.always + b[0] + b[4]
    second, third = b[2] + b[3] + b[4] + head, b[3] + b[4] + b[5] + head
    assert exits.cumulative_N.tolist() == [first, first + second, first + second + third]
    assert exits.straight_N.tolist() == exits.cumulative_N.tolist()  # an exit's answer needs every pass before it
    assert exits.fixed_F.tolist() == blocks.of(torch.tensor([*SETS[1:], (1,) * 6])).tolist()
    assert exits.full == blocks.full


def test_a_file_builds_it_again_with_its_sets(tmp_path, images):
    network = passes()
    save(network, tmp_path / "n.safetensors")
    again = load_exits(str(tmp_path / "n.safetensors"))
    assert isinstance(again, PassNetwork) and again.sets == network.sets
    assert again.content_hash() == network.content_hash() != passes(SETS[:2]).content_hash()
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "keep-sets of the 6 blocks of .*, got sets of none"),
        ([(1, 0), (1, 1)], "got sets of 2, 2"),
        ([SETS[0], SETS[0]], "two passes have the same keep-set"),
    ],
)
def test_sets_that_make_no_passes_are_refused(sets, message):
    with pytest.raises(UserError, match=message):
        passes(sets)


def test_a_pass_is_described_with_what_it_costs():
    lines = passes().remarks(SHAPE)
    assert [line.split(" (")[0] for line in lines] == [
        f"pass {n} keeps {m} of 6 blocks" for n, m in ((1, 2), (2, 4), (3, 4))
    ]
    assert "shares 1 of them with an earlier pass" in lines[1]
