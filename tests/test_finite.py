"""Numbers that are NaN or infinite stop a run before it learns from them or saves them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from policyskip.errors import UserError
from policyskip.finite import NotFiniteError, check_finite, check_gradients, find_nonfinite
from policyskip.runs.folder import create
from tests.learners import LEARNERS, learn, network_of


def weights(learner: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network_of(learner).parameters()]


def test_what_is_not_finite_is_named():
    check_finite("ppo", 3, logits=torch.ones(2, 2), loss=torch.tensor(1.0))
    with pytest.raises(NotFiniteError, match=r"ppo stops before update 3: its big loss: inf"):
        check_finite("ppo", 3, logits=torch.ones(2), big_loss=torch.tensor(torch.inf))
    with pytest.raises(NotFiniteError, match=r"its logits: 1 of 4 values, such as nan"):
        check_finite("ppo", 3, logits=torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]))


def test_large_gradients_are_no_infinite_ones():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    check_gradients("ppo", 1, optimizer)  # there are none yet
    weight.grad = torch.full((2,), 3e38)  # whose sum of squares overflows
    check_gradients("ppo", 1, optimizer)
    weight.grad = torch.tensor([0.0, torch.nan])
    with pytest.raises(NotFiniteError, match="largest gradients"):
        check_gradients("ppo", 1, optimizer)


def test_the_first_bad_tensor_is_found_in_nested_states():
    state = {"step": 3, "policy": {"a": torch.ones(2), "keep": torch.ones(2, dtype=torch.bool)}, "more": [1.0]}
    assert find_nonfinite(state) is None
    state["more"] = [torch.ones(1), {"x": torch.tensor([torch.inf])}]
    assert find_nonfinite(state) == "more.1.x"


@pytest.mark.parametrize("what", ["weight", "gradient", "image"])
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_stops_before_the_update(name, what, tmp_path):
    """At update 5 of 8, after the checkpoint of update 3."""
    before: list[torch.Tensor] = []
    seen: list[Any] = []

    def spoil(learner: Any, source: Any, number: int) -> None:
        if number != 5:
            return
        seen.append(learner)
        parameter = [p for p in network_of(learner).parameters() if p.requires_grad][-1]
        if what == "weight":
            parameter.data.view(-1)[0] = torch.nan
        elif what == "gradient":
            parameter.register_hook(lambda gradient: gradient * torch.inf)
        else:  # what the network sees of the images
            network = network_of(learner)
            buffer = dict(network.named_buffers()).get("mean")
            target = (
                buffer if buffer is not None else next(b for k, b in network.named_buffers() if k.endswith(".mean"))
            )
            target.fill_(torch.nan)
        before.extend(weights(learner))

    run = create(str(tmp_path / "run"), "policyskip train", "")
    with pytest.raises(UserError) as refused:
        learn(name, run, spoil=spoil)
    message = str(refused.value)
    agent = name.split(" ")[0]
    assert re.search(rf"{agent} stops before update 5: its \w+", message), message
    assert f"the last good checkpoint is {run.folder / 'checkpoint.pt'}, of update 3" in message and "\n" not in message
    for old, new in zip(before, weights(seen[0]), strict=True):
        assert torch.equal(old.nan_to_num(9), new.nan_to_num(9))
    state = run.load_checkpoint()
    assert state["step"] == 3 and find_nonfinite(state["learner"]) is None
    assert learn(name, run, resume=True)


def test_weights_that_an_update_spoils_are_not_saved(tmp_path):
    """A step so large that a weight overflows: the loss is seen only at the next update, the checkpoint is due now."""

    def spoil(learner: Any, source: Any, number: int) -> None:
        if number == 6:
            learner.optimizer.register_step_post_hook(lambda *_: learner.policy.keep_head.weight.data.fill_(torch.inf))

    run = create(str(tmp_path / "run"), "policyskip train", "")
    with pytest.raises(UserError, match=r"blockdrop has non-finite numbers after update 6, in policy\..* of update 3"):
        learn("blockdrop", run, spoil=spoil)
    assert run.load_checkpoint()["step"] == 3


def test_before_the_first_checkpoint_it_says_so(tmp_path):
    def spoil(learner: Any, source: Any, number: int) -> None:
        learner.policy.keep_head.bias.data.fill_(torch.nan)

    run = create(str(tmp_path / "run"), "policyskip train", "")
    with pytest.raises(UserError, match=r"before update 1: its logits: .*; no checkpoint had been written"):
        learn("blockdrop", run, spoil=spoil)
    assert not (run.folder / "checkpoint.pt").exists()


def test_a_reward_that_goes_wrong_later_is_told_with_its_checkpoint(tmp_path):
    def spoil(learner: Any, source: Any, number: int) -> None:
        if number == 5:
            source.reward = lambda outcome: outcome.macs_B / 0

    run = create(str(tmp_path / "run"), "policyskip train", "")
    with pytest.raises(UserError, match=r"the reward <lambda> returned 48 non-finite .*checkpoint\.pt, of update 3"):
        learn("blockdrop", run, spoil=spoil)
