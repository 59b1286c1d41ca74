"""The families of rivals: what is in them, what they cost, and that what is chosen is scored as the network decides."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from policyskip import training
from policyskip.agents import fixed
from policyskip.backbones import count_costs, dense
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.build import Setup
from policyskip.data import Data, TensorImages
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions, load_decisions, save_decisions
from policyskip.evaluation.evaluate import exit_decisions
from policyskip.evaluation.tables import show_blocks, show_exits, verdict_line
from policyskip.exits.cache import cache_exits
from policyskip.rewards import Macs
from policyskip.rivals import Family, choose
from policyskip.runs.folder import Run
from policyskip.static_front import StaticFront, find_front
from policyskip.static_front.table import set_name
from policyskip.tasks import blocks, rivals
from policyskip.tasks.fronts import with_block_selection
from policyskip.tasks.rivals import block_verdict, exit_verdict, own_family, searched_families
from policyskip.tasks.run_rivals import RunRival, load_run_rivals
from tests.conftest import small_backbone, small_images, typed

SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def setup() -> Setup:
    """A random network of six blocks over images of five classes."""
    data = Data("small", *(small_images(60, seed=n) for n in range(3)), classes=tuple("abcde"), image_shape=SHAPE)
    return Setup({}, torch.device("cpu"), data, small_backbone(), None, 16)


@pytest.fixture(scope="module")
def front(setup) -> StaticFront:
    return find_front(setup.backbone, setup.data.validation, count_costs(setup.backbone, SHAPE), 1e5, 60)


def right(setup: Setup, keep: tuple[bool, ...], images: TensorImages) -> Tensor:
    """Whether a network with these blocks alone is right on each image, bool (N,)."""
    keep_NK = torch.tensor(keep).expand(len(images), -1)
    with torch.no_grad():
        return dense(setup.backbone, images.images, keep_NK).argmax(1) == images.label_N


def decided(setup: Setup, keep_NK: Tensor, policy_macs: float = 0.0) -> Decisions:
    """The record of these decisions, bool (N, K), for the test images."""
    images, costs = setup.data.test, count_costs(setup.backbone, SHAPE)
    with torch.no_grad():
        prediction_N = dense(setup.backbone, images.images, keep_NK).argmax(1)
    full_N = right(setup, (True,) * 6, images)
    macs_N = costs.of(keep_NK) + policy_macs
    return Decisions(
        "blocks", images.label_N, prediction_N, keep_NK, macs_N, costs.full, full_N, policy_macs=policy_macs
    )


def drawn_sets(seed: int, count: int = 60) -> Tensor:
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(seed)) < 0.6


def test_every_family_is_judged_and_the_chosen_sets_are_scored_as_the_network_decides(setup, front):
    decisions = decided(setup, drawn_sets(0))
    figures, pairs = block_verdict(setup, decisions, drawn_sets(1), front, [])
    assert {line["family"] for line in figures["rivals"]} == {
        *("searched blocks", "evenly spread blocks"),
        *("the policy's own blocks, fixed", "the policy's decisions, dealt at random"),
    }
    assert figures["verdict"] in ("pays", "does not pay", "not shown") and figures["rival_finished"]
    cost = decisions.macs_N.mean().item()
    choice = rivals.choose(searched_families(setup, front)[0].family, cost)
    expected = sum(w * right(setup, front.sets[i], setup.data.test).double().mean().item() for i, w in choice.parts)
    (line,) = (line for line in figures["rivals"] if line["family"] == "searched blocks")
    assert line["accuracy"] == pytest.approx(expected) and line["macs"] == pytest.approx(choice.macs)
    assert line["margin"] == pytest.approx(decisions.accuracy - expected)
    for macs, accuracy in pairs:
        (index,) = (i for i in front.hull if front.macs[i] == macs)
        assert accuracy == right(setup, front.sets[index], setup.data.test).double().mean().item()
    assert block_verdict(setup, decisions, drawn_sets(1), front, []) == (figures, pairs)


def test_beside_a_weak_front_nothing_is_said_to_pay(setup, front):
    """A search was cut off, or was one of an older version, which ended with weak sets and called that its end."""
    older = replace(front, correct_FN=None, stated_accuracy=front.accuracy)
    keep_NK = torch.ones(60, 6, dtype=torch.bool)
    keep_NK[0, 0] = False  # of one decision for all, whatever is dealt is what was decided
    decisions = decided(setup, keep_NK)
    every_right = replace(decisions, prediction_N=decisions.label_N)
    for given, because in ((front, ""), (older, "older version"), (replace(front, finished=False), "front.budget")):
        figures, _ = block_verdict(setup, every_right, None, given, [])
        assert figures["verdict"] == ("not shown" if because else "pays") and because in figures["verdict_because"]
        assert figures["rival_finished"] == (not because)


def test_the_picture_has_the_sets_that_the_policy_is_compared_with(setup, front, monkeypatch):
    monkeypatch.setattr(rivals, "points_of", lambda front, images: [])
    decisions = decided(setup, drawn_sets(0))
    _, pairs = block_verdict(setup, decisions, None, front, [])
    choice = rivals.choose(searched_families(setup, front)[0].family, decisions.macs_N.mean().item())
    assert (
        {front.macs[i] for i, _ in choice.parts} <= {macs for macs, _ in pairs} <= {front.macs[i] for i in front.hull}
    )


def test_a_policy_s_own_sets_are_those_that_it_uses_on_validation_images(setup, front, monkeypatch):
    given = []

    def verdict(setup, decisions, keep_VK, *others):
        given.append(keep_VK)
        return {}, []

    monkeypatch.setattr(blocks, "block_verdict", verdict)
    setup = with_block_selection(replace(setup, reward=Macs(1.0)))
    agent = fixed.random(setup.env(setup.data.train), blocks=3)  # decides by the pixels
    blocks.judge_policy(setup, agent, front, "test")
    assert torch.equal(given[0], agent.policy.decide(setup.data.validation.images))
    blocks.judge_policy(setup, agent, front, "validation")
    assert len(given) == 1  # a verdict takes images on which nothing was chosen


def test_a_policy_that_is_one_fixed_set_has_itself_as_a_rival(setup, front):
    keep_NK = torch.tensor([True, False, True, True, False, True]).expand(60, -1)
    figures, _ = block_verdict(setup, decided(setup, keep_NK, policy_macs=10.0), keep_NK, front, [])
    (dealt,) = (line for line in figures["rivals"] if "dealt" in line["family"])
    assert (dealt["margin"], dealt["low"], dealt["high"]) == (0, 0, 0) and figures["verdict"] != "pays"
    assert dealt["macs"] == pytest.approx(decided(setup, keep_NK).macs_N.mean().item())  # dealing takes no policy


def test_dealt_decisions_are_an_expectation_over_images_and_decisions(setup):
    """Half of the images run all blocks and half none: dealt again and again, each image runs all blocks half the time."""
    keep_NK = (torch.arange(60) % 2 == 0)[:, None].expand(60, 6)
    rival = rivals.dealt_blocks(setup, decided(setup, keep_NK), setup.data.test)
    every, none = (right(setup, (kept,) * 6, setup.data.test).double() for kept in (True, False))
    alike_N = every == none
    assert torch.equal(rival.correct_N[alike_N], every[alike_N])
    assert rival.correct_N.mean().item() == pytest.approx(((every + none) / 2).mean().item(), abs=0.1)
    span = count_costs(setup.backbone, SHAPE).block_K.sum().item()
    assert rival.choice.slope * span == pytest.approx((every.mean() - none.mean()).item(), abs=0.2)


def test_the_own_blocks_are_the_most_frequent_decisions_and_the_blocks_kept_most(setup):
    rows = ["111000"] * 6 + ["100000"] * 3 + ["000111"]
    keep_VK = torch.tensor([[mark == "1" for mark in row] for row in rows])
    setup = Setup({}, setup.device, setup.data, setup.backbone, None, 16)
    family = own_family(setup, keep_VK)
    named = {"".join("01"[k] for k in keep): name for (_, keep), name in zip(family.sets, family.family.labels)}
    assert named["111000"] == "3 blocks that the policy often chooses" and len(named) == 3 + 2
    assert named["110000"] == "the 2 blocks that the policy keeps most often" and "111100" in named
    costs = count_costs(setup.backbone, SHAPE)
    assert family.family.macs_F.tolist() == [costs.of(torch.tensor(keep)).item() for _, keep in family.sets]


@pytest.mark.parametrize(
    ("keep", "kind", "name"),
    [
        ("1100", "moves", "2 searched blocks"),
        ("1000", "spread", "1 evenly spread block"),
        ("1100", "random", "2 randomly drawn blocks"),
        ("1100", "policy", "2 blocks that the policy often chooses"),
        ("1111", "spread", "all 4 blocks"),
        ("0000", "moves", "none of the blocks"),
    ],
)
def test_sets_are_named_by_size_and_origin(keep, kind, name):
    assert set_name(tuple(mark == "1" for mark in keep), kind) == name


@pytest.fixture(scope="module")
def exits() -> ResNetExits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetExits(small_backbone(), [1, 3], "pooled", SHAPE).eval()


def test_the_network_up_to_an_exit_answers_as_the_exit(exits):
    images = small_images(8).images
    with torch.no_grad():
        logits_BNC = exits(images)
        for n, blocks in enumerate((2, 4, 6)):
            part = exits.up_to(n)
            assert (part.num_blocks, sum(part.stages)) == (blocks, blocks)
            assert torch.allclose(part(images), logits_BNC[:, n], atol=1e-5)
    assert exits.up_to(2) is exits.backbone and exits.backbone.num_blocks == 6


def test_exits_are_judged_beside_exits_blocks_and_both(setup, exits, monkeypatch):
    families: dict[str, Family] = {}
    monkeypatch.setattr(rivals, "choose", lambda f, macs: choose(families.setdefault(f.name, f), macs))
    cache, validation = (cache_exits(exits, images) for images in (setup.data.test, setup.data.validation))
    exit_M = torch.arange(60) % 3
    decisions = exit_decisions(exit_M, cache)
    trunk = Setup({}, setup.device, setup.data, exits.backbone, None, 16)
    found = find_front(exits.backbone, setup.data.validation, count_costs(exits.backbone, SHAPE), 1e5, 60)
    figures = exit_verdict(trunk, exits, decisions, cache, validation, found, [])
    assert {line["family"] for line in figures["rivals"]} == {
        *("searched blocks", "evenly spread blocks", "fixed exits", "exits and blocks"),
        "the policy's decisions, dealt at random",
    }
    by_family = {line["family"]: line for line in figures["rivals"]}
    dealt = by_family["the policy's decisions, dealt at random"]
    assert dealt["accuracy"] == pytest.approx(cache.correct_MN.double().mean().item())  # a third of the images each
    assert dealt["macs"] == pytest.approx(cache.costs.straight_N.mean().item())
    cost = decisions.macs_N.mean().item()
    choice = rivals.choose(searched_families(trunk, found)[0].family, cost)
    expected = sum(w * right(trunk, found.sets[i], setup.data.test).double().mean().item() for i, w in choice.parts)
    assert by_family["searched blocks"]["accuracy"] == pytest.approx(expected)
    alone = families["fixed exits"]
    assert torch.equal(alone.macs_F, cache.costs.straight_N)  # no head runs on the way
    assert torch.equal(alone.correct_FV, validation.correct_MN.T)
    choice = rivals.choose(alone, cost)
    expected = choice.mixed([cache.correct_MN[:, n] for n, _ in choice.parts]).mean().item()
    assert by_family["fixed exits"]["accuracy"] == pytest.approx(expected)
    without = exit_verdict(trunk, exits, decisions, cache, validation, None, [])
    assert len(without["rivals"]) == 2 and not without["rival_finished"]
    assert without["verdict"] != "pays"


# Sentences

PAYS = {"verdict": "pays", "verdict_because": "", "rival": "33 evenly spread blocks", "rival_macs": 10.0}
PAYS |= {"rival_accuracy": 0.8, "rival_margin": 0.012, "rival_low": 0.0031, "rival_high": 0.0175, "macs_mean": 10.0}
AGAINST = "+1.20 points (+0.31 to +1.75) against 33 evenly spread blocks, the strongest fixed rival"


@pytest.mark.parametrize(
    ("changed", "steps", "line"),
    [
        ({}, 5, f"This policy pays: {AGAINST} of equal cost."),
        ({"verdict": "does not pay"}, 5, f"This policy does not pay: {AGAINST} of equal cost."),
        (
            {"verdict": "not shown", "verdict_because": "the interval includes 0"},
            5,
            f"Whether this policy pays is not shown: {AGAINST} of equal cost: the interval includes 0.",
        ),
        ({"rival_macs": 8.0}, 5, f"This policy pays: {AGAINST} at 0.800 of its cost."),
        ({"sees_the_label": True}, 0, f"oracle, which sees the label, pays: {AGAINST} of equal cost."),
        ({}, 0, f"oracle, which learns nothing, pays: {AGAINST} of equal cost."),
        (
            {"rival": None, "verdict": "not shown", "verdict_because": "every fixed choice costs more than the policy"},
            5,
            "Whether this policy pays is not shown: every fixed choice costs more than the policy.",
        ),
        ({"verdict": None}, 5, "Whether this policy pays is not shown: it was judged by an older version."),
    ],
)
def test_the_verdict_is_one_sentence(changed, steps, line):
    figures = {f"test/{key}": value for key, value in (PAYS | changed).items()}
    assert verdict_line({"agent": "oracle", "steps": steps, **figures}) == line


# Finished runs as rivals

DATA = ["data.train=64", "data.validation=60", "data.test=50", "data.batch_size=32", "device=cpu", "tracking=none"]
SMALL = [*DATA, "backbone=cifar_resnet", "backbone.depth=8", "backbone.checkpoint=random"]
SMALL += ["front.budget=4e3", "front.images=20"]
LEARN = ["train.steps=1", "agent.width=4"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of fixed sets."""
    folder = tmp_path_factory.mktemp("rivals")
    for agent, more in (("distributed", ["agent.blocks=1"]), ("full", [])):
        result = typed("train", f"agent={agent}", *SMALL, *more, f"run.dir=runs/{agent}", cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def test_a_finished_run_is_a_rival_and_its_folder_is_not_needed_again(workshop):
    runs = workshop / "runs"
    given = f"front.rivals=[runs/distributed,runs/full,{runs}/../runs/distributed]"  # the first and the last are one
    result = typed("train", *SMALL, *LEARN, given, "agent.warm_start=false", "run.dir=runs/x", cwd=workshop)
    assert result.returncode == 0, result.stderr
    summary = json.loads((runs / "x/summary.json").read_text())
    name = "distributed over resnet8 (distributed)"
    rival, decisions = load_decisions(Run(runs / "distributed")), load_decisions(Run(runs / "x"))
    (line,) = (line for line in summary["test/rivals"] if line["family"] == f"the run {name}")
    assert (line["name"], line["macs"]) == (name, rival.macs_N[0].item())
    assert line["margin"] == pytest.approx(decisions.accuracy - rival.accuracy)
    if decisions.macs_N.mean() * 1.005 < rival.full_macs:
        assert summary["test/rivals_dearer"] == ["full over resnet8 (full)"]
        assert "No rival at this cost: full over resnet8 (full), which costs more." in result.stdout
    moved = workshop / "elsewhere"
    shutil.move(runs / "distributed", moved)
    again = typed("evaluate", "run=runs/x", "device=cpu", cwd=workshop)
    shutil.move(moved, runs / "distributed")
    assert again.returncode == 0 and "Every figure is that of summary.json." in again.stdout, again.stderr
    assert "No verdict on validation images" in typed("evaluate", "run=runs/x", "split=validation", cwd=workshop).stdout


def test_an_unfinished_run_goes_on_when_its_rival_has_gone(workshop, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    runs, words = workshop / "runs", ["agent.warm_start=false", "front.rivals=[runs/distributed]", "run.dir=runs/cut"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", interrupted)
        assert typed("train", *SMALL, *LEARN, *words, cwd=workshop).returncode == 130
    moved = shutil.move(runs / "distributed", workshop / "elsewhere")
    result = typed("train", "run.resume=runs/cut", cwd=workshop)
    shutil.move(moved, runs / "distributed")
    assert result.returncode == 0, result.stderr
    compared = json.loads((runs / "cut/summary.json").read_text())["test/rivals"]
    assert [line["name"] for line in compared if "the run" in line["family"]] == [
        "distributed over resnet8 (distributed)"
    ]
    with pytest.raises(UserError, match="rivals.json is about other test images"):
        load_run_rivals(Run(runs / "cut"), small_images(50))


@pytest.mark.parametrize(
    ("rival", "more", "message"),
    [
        ("runs/nowhere", [], "front.rivals: the run folder runs/nowhere does not exist"),
        ("runs/random", [], "runs/random cannot be a rival: it decides image by image"),
        ("runs/full", ["data.test=40"], "runs/full cannot be a rival: it was judged on other images than the test"),
        ("runs/unfinished", [], "runs/unfinished cannot be a rival: it is not a finished run"),
        ("runs/classes", [], "runs/classes cannot be a rival: its classes are not those of digits"),
        ("runs/oracle", [], "runs/oracle cannot be a rival: it sees the label"),
    ],
)
def test_what_is_no_rival_is_refused_by_name_before_anything_is_made(rival, more, message, workshop, tmp_path):
    runs = shutil.copytree(workshop / "runs", tmp_path / "runs")
    for name in ("unfinished", "classes", "oracle", "random"):
        shutil.copytree(runs / "full", runs / name)
    decisions = load_decisions(Run(runs / "full"))
    save_decisions(replace(decisions, ran_NK=torch.arange(50)[:, None] % 2 < torch.ones(3)), Run(runs / "random"))
    (runs / "unfinished/policy.json").unlink()
    path = runs / "classes/decisions.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"0\\", \\"1', b'"1\\", \\"0'))
    path = runs / "oracle/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test/sees_the_label": True}))
    words = [*SMALL, *LEARN, *more, f"front.rivals=[{rival}]", "run.dir=runs/y"]
    result = typed("train", *words, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (runs / "y").exists()


def test_a_front_without_a_policy_takes_no_rivals(tmp_path):
    result = typed("front", *DATA[:-1], "front.rivals=[runs/a]", cwd=tmp_path)
    assert result.returncode == 2 and "front.rivals: train compares rivals with a policy" in result.stderr


@pytest.mark.parametrize("backbone", ["resnet32_digits_exits", "msdnet_digits"])
def test_a_front_over_a_network_with_exits_is_refused_in_one_line(backbone, tmp_path):
    result = typed("front", *DATA[:-1], f"backbone={backbone}", cwd=tmp_path)
    assert result.returncode == 2 and "this network has exits; name one without by backbone=" in result.stderr


def test_an_older_summary_is_shown_without_a_verdict(capsys):
    """What version 0.4 wrote."""
    stored = Path(__file__).parent.parent / "stored" / "runs"
    show_blocks(json.loads((stored / "blockdrop/summary.json").read_text()))
    show_exits(json.loads((stored / "cdl/summary.json").read_text()))
    assert capsys.readouterr().out.count("judged by an older version") == 2


def test_a_run_that_costs_more_is_no_rival_at_that_cost(setup, front):
    decisions = decided(setup, drawn_sets(0))
    cost = decisions.macs_N.mean().item()
    runs = [RunRival(name, macs, decisions.correct_N) for name, macs in (("a", 1.004 * cost), ("b", 1.006 * cost))]
    figures, _ = block_verdict(setup, decisions, None, front, runs)
    assert figures["rivals_dearer"] == ["b"]
    (line,) = (line for line in figures["rivals"] if line["family"] == "the run a")
    assert line["margin"] == 0 and figures["verdict"] != "pays"


def test_a_front_of_other_images_or_of_more_than_there_are_is_refused(setup, front):
    more = replace(front, images=70, correct_FN=torch.ones(len(front.sets), 70, dtype=torch.bool))
    for other in (more, replace(front, data="others")):
        with pytest.raises(UserError, match="the static front is of other validation images than those of small"):
            searched_families(setup, other)


def test_images_that_belong_together_are_drawn_together(setup, front, monkeypatch):
    """Of one group, the test images say nothing."""
    seen = SimpleNamespace(groups=[])

    def groups(images, count=None):
        seen.groups.append(count)
        return torch.zeros(count or len(images), dtype=torch.int64)

    monkeypatch.setattr(rivals, "_groups", groups)
    figures, _ = block_verdict(setup, decided(setup, drawn_sets(0)), None, front, [])
    assert figures["rival_low"] is None and "no interval" in figures["verdict_because"] and len(seen.groups) > 1
