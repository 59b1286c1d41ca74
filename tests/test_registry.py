"""Names of the package, of installed packages and of the user: what is imported, what is refused, what is stored."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import policyskip
from policyskip import registry
from policyskip.agents.blockdrop import BlockDrop
from policyskip.agents.fixed import FixedAgent, best_static
from policyskip.backbones import checkpoints, load_exits
from policyskip.backbones.checkpoints import save
from policyskip.build import build, build_backbone, build_data
from policyskip.data import Data
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.exits.calibration import curve_of
from policyskip.exits.rules import Measured, exit_of, rule_named
from policyskip.policies.networks import PolicyNetwork, policy_network
from policyskip.sealed import sealed
from tests.conftest import small_backbone, small_cache, small_images
from tests.installing import install

MODULE = """
from pathlib import Path

Path("imported").touch()


def mine():
    return 3


class Mine:
    class Inner:
        pass


three = 3
"""
CPU = torch.device("cpu")
NETWORKS = """
import torch
from torch import nn

from policyskip.backbones import Backbone, Block, ExitNetwork, ResNetExits
from policyskip.backbones.resnet import CifarResNet


class Residual(Backbone):
    def __init__(self, num_classes, width=4, checkpoint="nowhere.pth"):
        if checkpoint != "random":
            raise OSError(f"there is no {checkpoint}")
        blocks = [Block(nn.Conv2d(width, width, 3, padding=1), nn.Identity()) for _ in range(3)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        super().__init__(nn.Conv2d(3, width, 3, padding=1), blocks, head, num_classes, [0.5] * 3, [0.5] * 3, [3])


class Leaky(CifarResNet):
    def forward(self, images, keep_BK=None):
        return super().forward(images, keep_BK) / 2


def leaky(num_classes, image_shape, seed, slope=0.1):
    assert tuple(image_shape) == (3, 12, 12)
    return Leaky(8, num_classes, width=4)


def ours(num_classes):
    return CifarResNet(8, num_classes, width=4)


def with_exits(num_classes, image_shape):
    return ResNetExits(Residual(num_classes, checkpoint="random"), [0, 1], "pooled", image_shape)


def broken(num_classes, width=4):
    raise IndexError("list index out of range")


def none(num_classes):
    return None
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty current folder, importable as it is for the command line; what is imported from it is forgotten."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages, on ``sys.path`` and empty."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    return site


def imported() -> bool:
    return Path("imported").exists()


# What is found


def test_what_the_user_typed_is_imported(folder):
    (folder / "my_module.py").write_text(MODULE)
    assert registry.resolve("reward", "my_module.mine")() == 3
    assert registry.resolve("reward", "my_module.Mine.Inner").__name__ == "Inner"
    assert registry.find("rule", "my_module.three") == 3
    assert registry.resolve("agent", "policyskip.agents.blockdrop.BlockDrop", trusted=False) is BlockDrop


@pytest.mark.parametrize(
    ("group", "target", "message"),
    [
        ("reward", "my_nothing.Mine", "could not import reward._target_=my_nothing.Mine: ModuleNotFoundError: No mod"),
        ("reward", "my_module.Yours", "could not import reward._target_=my_module.Yours: AttributeError: .*'Yours'"),
        ("policy", "my_module.Mine.Yours", r"could not import agent\.policy=my_module.Mine.Yours: AttributeError"),
        ("reward", "my_module.three", "reward._target_=my_module.three is no class or function"),
        ("rule", "my_broken.mine", r"could not import agent\.rule=my_broken\.mine: ZeroDivisionError"),
        ("reward", "mine", r"reward\._target_=mine is no installed reward \(none is installed\); or say package\.modu"),
    ],
)
def test_what_cannot_be_imported_is_named(folder, group, target, message):
    (folder / "my_module.py").write_text(MODULE)
    (folder / "my_broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match=message) as refused:
        registry.resolve(group, target)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("group", registry.GROUPS)
def test_installed_names_and_their_paths_need_no_trust(site, group):
    point = {"data": "policyskip.data", "policy": "policyskip.policies"}.get(group, f"policyskip.{group}s")
    install(
        site, "my_package", {point: {"short": "my_module:mine", "nested": "my_module:Mine.Inner"}}, my_module=MODULE
    )
    for target in ("short", "my_module.mine"):
        assert registry.resolve(group, target, trusted=False)() == 3
        assert registry.path_of(group, target) == "my_module.mine"
        with registry.trusting(False):
            assert registry.resolve(group, target)() == 3
    assert registry.resolve(group, "my_module.Mine.Inner", trusted=False).__name__ == "Inner"
    other = "reward" if group == "env" else "env"
    with pytest.raises(UserError, match="not installed here"):
        registry.resolve(other, "my_module.mine", trusted=False)


def test_the_older_name_of_the_group_of_data_sets_is_read_too(site):
    install(site, "my_package", {"policyskip.datas": {"short": "my_module:mine"}}, my_module=MODULE)
    assert registry.resolve("data", "short", trusted=False)() == 3


def test_a_class_that_its_package_exports_again_goes_by_the_module_that_defines_it(site):
    points = {"policyskip.policies": {"short": "my_package:Mine"}}
    install(
        site, "my_package", points, my_module=MODULE, my_package="from my_module import Mine\nfrom my_package2 import A"
    )
    (site / "my_package2.py").write_text("class A: ...")
    with pytest.raises(UserError, match="not installed here"):  # of another package, as far as names tell
        registry.resolve("policy", "my_module.Mine", trusted=False)
    assert not imported()
    install(site, "my_other", {"policyskip.policies": {"other": "my_package2:B"}})
    (site / "my_package2.py").write_text("class A: ...\nB = A")
    kind = registry.resolve("policy", "other", trusted=False)
    assert registry.name_of("policy", kind) == "my_package2.A"
    assert registry.resolve("policy", "my_package2.A", trusted=False) is kind


# What is stored


def test_names_to_store():
    assert registry.name_of("policy", PolicyNetwork) == "PolicyNetwork"
    assert registry.name_of("policy", type("Mine", (PolicyNetwork,), {"__module__": "my_module"})) == "my_module.Mine"


def test_the_class_that_a_target_declares():
    def unknown(): ...

    def nothing() -> None: ...

    def undefined() -> Undefined: ...  # noqa: F821

    assert registry.declared_class(BlockDrop) is BlockDrop
    assert registry.declared_class(best_static) is FixedAgent
    assert [registry.declared_class(target) for target in (unknown, nothing, undefined)] == [None] * 3


# What is refused


def test_a_stored_name_is_imported_only_with_trust(folder):
    (folder / "my_module.py").write_text(MODULE)
    for group, what in (("policy", "policy"), ("rule", "exit rule"), ("backbone", "network")):
        refusal = (
            rf"this {what} is my_module\.mine, which is not installed here \(.*policyskip\..*\); say trust=True to imp"
        )
        with pytest.raises(UserError, match=refusal):
            registry.resolve(group, "my_module.mine", trusted=False)
        with registry.trusting(False), registry.trusting(True), pytest.raises(UserError, match=refusal):
            registry.resolve(group, "my_module.mine")
        with pytest.raises(
            UserError, match=rf"this {what} is short, which is not installed here \(none is installed\)$"
        ):
            registry.resolve(group, "short", trusted=True)
    assert not imported()
    assert registry.resolve("policy", "my_module.mine", trusted=True)() == 3


def test_what_lies_in_the_current_folder_is_not_installed(folder, monkeypatch):
    """A stranger's folder may hold anything, metadata as if of an installed package, too."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    install(folder, "my_package", {"policyskip.rewards": {"short": "my_module:mine"}}, my_module=MODULE)
    assert registry.installed("reward") == {}
    for target in ("short", "my_module.mine"):
        with pytest.raises(UserError, match="not installed here"):
            registry.resolve("reward", target, trusted=False)
    assert not imported()


@pytest.mark.parametrize("key", ["policy", "rule"])
def test_names_within_an_agent_s_arguments_are_trusted_as_the_agent_is(folder, key):
    (folder / "my_module.py").write_text(MODULE)
    target = {
        "policy": "policyskip.agents.blockdrop.BlockDrop",
        "rule": "policyskip.agents.msdnet.MSDNetAgent",
    }[key]
    env = BlockSelectionVectorEnv(4, backbone=small_backbone(), images=small_images())
    network = load_exits("msdnet_digits")
    network.requires_grad_(True)
    node = {"_target_": target, key: "my_module.mine"}
    with pytest.raises(
        UserError, match=f"the run's {key} my_module.mine is not one of policyskip's own; say trust=tru"
    ):
        build("agent", node, trusted=False, env=env, network=network, total_steps=2, seed=0)
    assert not imported()
    with pytest.raises(UserError, match=r"my_module\.mine|exit rule my_module\.mine is an int"):
        build("agent", node, trusted=True, env=env, network=network, total_steps=2, seed=0)
    assert imported()


def test_metadata_of_weights_import_nothing(folder):
    (folder / "my_module.py").write_text(MODULE)
    backbone = small_backbone()
    backbone.architecture = {"network": "my_module.mine"}
    save(backbone, folder / "net.safetensors")
    for load in (checkpoints.load, load_exits):
        with pytest.raises(UserError, match=r"this network is my_module\.mine, which is not installed here"):
            load("net.safetensors")
        assert not imported()
    with pytest.raises(UserError, match=r"my_module\.mine gave an int; it must be a Backbone"):
        checkpoints.load("net.safetensors", trusted=True)
    assert imported()


@pytest.mark.parametrize("function", ["architectures.build_again", "load", "load_exits"])
def test_a_stranger_s_file_cannot_trust_itself(folder, function):
    """The package's own readers of networks take ``trusted``, which a configuration that calls them could set."""
    (folder / "my_module.py").write_text(MODULE)
    architecture = {"network": "my_module.mine"}
    (folder / "net.safetensors").write_bytes(sealed({"weight": torch.zeros(1)}, architecture))
    named = {"architecture": architecture} if "again" in function else {"name": "net.safetensors"}
    node = {"_target_": f"policyskip.backbones.{function}", "trusted": True, **named}
    with pytest.raises(UserError, match=r"my_module\.mine"):
        build("backbone", node, trusted=False)
    assert not imported()
    with pytest.raises(UserError, match="gave an int"):
        build("backbone", node)
    assert imported()


# What is built, and built again


def data() -> Data:
    images = small_images()
    return Data("mine", images, images, images, tuple("abcde"), (3, 12, 12))


@pytest.mark.parametrize(
    ("node", "architecture"),
    [
        (
            {"_target_": "my_networks.Residual", "width": 6, "checkpoint": "random"},
            {"network": "my_networks.Residual", "num_classes": 5, "width": 6, "checkpoint": "random"},
        ),
        (
            {"_target_": "my_networks.leaky"},
            {"network": "my_networks.leaky", "num_classes": 5, "image_shape": [3, 12, 12], "seed": 20_000},
        ),
        ({"_target_": "my_networks.with_exits"}, None),
    ],
    ids=["class", "derived from one of ours", "exits"],
)
def test_a_network_of_the_user_s_is_built_again(folder, node, architecture):
    (folder / "my_networks.py").write_text(NETWORKS)
    before = torch.random.get_rng_state()
    networks = [build_backbone(node, data(), CPU, seed=20_000) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    network = networks[0]
    assert networks[1].content_hash() == network.content_hash()  # random weights follow from the seed
    assert architecture is None or network.architecture == architecture
    save(network.eval(), folder / "net.safetensors")
    load = load_exits if node["_target_"].endswith("exits") else checkpoints.load
    again = load("net.safetensors", trusted=True)
    assert type(again) is type(network) and again.frozen
    images = small_images(3).images
    with torch.no_grad():
        torch.testing.assert_close(again(images), network(images))
    with pytest.raises(UserError, match=rf"this network is {node['_target_']}, which is not installed here"):
        load("net.safetensors")


def test_one_of_our_networks_that_a_function_of_the_user_s_makes_needs_no_trust(folder):
    (folder / "my_networks.py").write_text(NETWORKS)
    network = build_backbone({"_target_": "my_networks.ours"}, data(), CPU)
    save(network, folder / "net.safetensors")
    assert checkpoints.load("net.safetensors").content_hash() == network.content_hash()


def test_an_installed_network_is_built_again_without_trust(folder, site):
    install(site, "my_package", {"policyskip.backbones": {"residual": "my_networks:Residual"}}, my_networks=NETWORKS)
    node = {"_target_": "residual", "checkpoint": "random"}
    network = build_backbone(node, data(), CPU, trusted=False)
    assert network.architecture["network"] == "my_networks.Residual"
    save(network, folder / "net.safetensors")
    assert checkpoints.load("net.safetensors").content_hash() == network.content_hash()


def test_exits_that_a_network_of_the_user_s_does_without_stay_away(folder):
    (folder / "my_networks.py").write_text(NETWORKS)
    network = build_backbone({"_target_": "my_networks.with_exits"}, data(), CPU)
    fewer = network.only([1])
    save(fewer, folder / "net.safetensors")
    again = load_exits("net.safetensors", trusted=True)
    assert again.num_exits == 2 and again.content_hash() == fewer.content_hash()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"_target_": "my_networks.Residual"},
            r"backbone: my_networks\.Residual failed with OSError: there is no nowh",
        ),
        (
            {"_target_": "my_networks.none"},
            r"backbone\._target_=my_networks\.none gave a NoneType; it must be a policy",
        ),
    ],
)
def test_what_is_no_network_is_refused(folder, node, message):
    (folder / "my_networks.py").write_text(NETWORKS)
    with pytest.raises(UserError, match=message):
        build_backbone(node, data(), CPU)


def test_a_network_that_fails_while_it_is_read_is_not_called_damaged(folder):
    (folder / "my_networks.py").write_text(NETWORKS)
    network = small_backbone()
    network.architecture = {"network": "my_networks.broken", "num_classes": 5}
    save(network, folder / "net.safetensors")
    with pytest.raises(
        UserError, match=r"^net\.safetensors: my_networks\.broken failed with IndexError: list index"
    ) as error:
        checkpoints.load("net.safetensors", trusted=True)
    assert isinstance(error.value.__cause__, IndexError)


def test_data_and_agents_of_another_kind_are_refused(folder):
    (folder / "my_data.py").write_text("def nothing(device):\n    return {}")
    with pytest.raises(
        UserError, match=r"data\._target_=my_data\.nothing gave a dict; it must be a policyskip\.data\.Data"
    ):
        build_data({"_target_": "my_data.nothing"}, CPU)


# Exit rules

RULES = """
import torch

from policyskip.exits.rules import Measured


def distance(probability):
    top = probability.topk(2, -1).values
    return top[..., 0] - top[..., 1]


class Margin:
    extremes = (2.0, 0.0)

    def leaves(self, probability, threshold):
        return distance(probability) >= threshold

    def turning_points(self, probability):
        return distance(probability).flatten()


class Late(Margin):
    extremes = (0.0,)


class Soft(Margin):
    def leaves(self, probability, threshold):
        return probability.amax(-1)


class Square(Margin):
    def turning_points(self, probability):
        return probability


class Broken(Margin):
    def leaves(self, probability, threshold):
        return [][1]


class Empty(Margin):
    extremes = ()


class Needy(Margin):
    def __init__(self, sharpness):
        pass


margin = Margin()
top = Measured("whatever", lambda p: p.amax(-1), high_is_sure=True, never=2.0, always=0.0)


def from_function():
    return top
"""


@pytest.mark.parametrize("target", ["Margin", "margin", "top", "from_function"])
def test_a_rule_of_the_user_s_goes_by_its_path(folder, target):
    (folder / "my_rules.py").write_text(RULES)
    rule = rule_named(f"my_rules.{target}")
    assert rule.name == f"my_rules.{target}"
    assert isinstance(rule, Measured) == (target in ("top", "from_function"))
    cache = small_cache()
    search = "quota" if isinstance(rule, Measured) else "grid"
    curve = curve_of(cache, rule.name, search)
    exit_M = exit_of(rule, cache.probability_MNC, curve[5].thresholds)
    accuracy, macs = (figure.item() for figure in cache.judge(exit_M.unsqueeze(0)))
    assert curve[5].rule == rule.name and (curve[5].accuracy, curve[5].macs) == pytest.approx((accuracy, macs))
    if not isinstance(rule, Measured):
        with pytest.raises(
            UserError, match=r"quota needs a rule that orders images, .* my_rules\.\w+ does not: say age"
        ):
            curve_of(cache, rule.name, "quota")


def test_an_installed_rule_goes_by_its_name_without_trust(site):
    install(site, "my_package", {"policyskip.rules": {"margin": "my_rules:Margin"}}, my_rules=RULES)
    with registry.trusting(False):
        assert rule_named("margin").name == "margin" and rule_named("my_rules.Margin").name == "my_rules.Margin"
        with pytest.raises(
            UserError, match=r"one of confidence, .*, got 'label', which is not installed .* \(margin\)"
        ):
            rule_named("label")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch", "the exit rule my_rules.torch is a module without extremes; a rule needs it"),
        ("Empty", r"extremes of the exit rule my_rules\.Empty must be a tuple of one or two numbers, got \(\)"),
        ("Late", "at 0.0, the first of its extremes, no image may leave by the exit rule my_rules.Late"),
        ("Soft", r"leaves of the exit rule my_rules\.Soft must return bool .* got torch\.float32 \(2,\)"),
        ("Square", r"turning_points of .*Square must return floats in one dimension, got torch\.float32 \(2, 3\)"),
        ("Broken", "the exit rule my_rules.Broken failed with IndexError: list index"),
        ("Needy", "the exit rule my_rules.Needy failed with TypeError: .*'sharpness'"),
    ],
)
def test_what_is_no_rule_is_refused_before_anything_is_learned(folder, target, message):
    (folder / "my_rules.py").write_text(RULES)
    with pytest.raises(UserError, match=message) as refused:
        rule_named(f"my_rules.{target}")
    assert "\n" not in str(refused.value)


# Policy networks

POLICIES = """
import torch
from torch import nn

from policyskip.policies.networks import KeepPolicy, keep_layer


class Looks(KeepPolicy):
    def __init__(self, num_blocks, initial_keep, image_shape, hidden=3):
        super().__init__(num_blocks)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_shape[1] * image_shape[2], hidden))
        self.keep_head = keep_layer(hidden, num_blocks, initial_keep)

    def features_and_logits(self, images):
        features = self.features(images / 255)
        return features, self.keep_head(features)


class Forward(KeepPolicy):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.layers = nn.Linear(3, num_blocks)

    def forward(self, images):
        return self.layers((images / 255).mean((2, 3)))


class Neither(KeepPolicy):
    pass


class Narrow(Forward):
    def forward(self, images):
        return super().forward(images)[:, :1]


class Broken(KeepPolicy):
    def __init__(self, num_blocks):
        raise IndexError("list index out of range")


class Other(nn.Module):
    pass
"""


def learner(**arguments) -> BlockDrop:
    env = BlockSelectionVectorEnv(8, backbone=small_backbone(), images=small_images())
    agent: BlockDrop = build("agent", {"_target_": BLOCKDROP, **arguments}, env=env, total_steps=4, seed=0)
    agent.update(env)
    return agent


BLOCKDROP = "policyskip.agents.blockdrop.BlockDrop"


@pytest.mark.parametrize("baseline", ["greedy", "value"])
@pytest.mark.parametrize("target", ["Looks", "Forward"])
def test_a_policy_network_of_the_user_s_learns_and_is_built_again(folder, target, baseline):
    (folder / "my_policies.py").write_text(POLICIES)
    agent = learner(policy=f"my_policies.{target}", baseline=baseline, initial_keep=0.9)
    policy = agent.policy
    arguments = {"num_blocks": 6} | ({"initial_keep": 0.9, "image_shape": [3, 12, 12]} if target == "Looks" else {})
    assert policy.spec() == arguments and agent.decision_macs > 0
    again = registry.resolve("policy", registry.name_of("policy", type(policy)), trusted=True)(**policy.spec())
    again.load_state_dict(policy.state_dict())
    images = small_images(5).images
    assert torch.equal(again.eval().decide(images), policy.eval().decide(images))
    assert copy.deepcopy(policy).spec() == arguments


def test_a_policy_network_of_the_user_s_starts_from_a_keep_set(folder):
    (folder / "my_policies.py").write_text(POLICIES)
    start = (True, False, True, True, False, True)
    policy = policy_network("my_policies.Looks", 6, (3, 12, 12), initial_keep=0.999)
    policy.start_from(start)
    assert policy.decide(torch.zeros(1, 3, 12, 12, dtype=torch.uint8)).tolist() == [list(start)]
    with pytest.raises(UserError, match=r"Forward cannot start from a keep-set, .*; say agent\.warm_start=false"):
        policy_network("my_policies.Forward", 6, (3, 12, 12)).start_from(start)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_policies.Other",
            "agent.policy=my_policies.Other must be a subclass of policyskip.policies.networks.KeepPol",
        ),
        ("my_policies.Broken", "agent.policy=my_policies.Broken failed with IndexError: list index out of range"),
        ("my_policies.Neither", "failed with NotImplementedError: Neither has neither features_and_logits nor forward"),
        ("my_policies.Narrow", r"must give features .*, here \(1, D\) and \(1, 6\); got \(1, 0\) and \(1, 1\)"),
        ("mine", r"'cifar', 'imagenet' or 'constant', got 'mine', which is not installed here either \(none is inst"),
    ],
)
def test_what_is_no_policy_network_is_refused(folder, name, message):
    (folder / "my_policies.py").write_text(POLICIES)
    with pytest.raises(UserError, match=message):
        learner(policy=name)


def test_a_policy_that_looks_at_numbers_while_it_is_made_is_loaded(folder):
    """It cannot be made without memory, so its size is first seen when it is made."""
    (folder / "my_policies.py").write_text(
        "import torch\n\nfrom policyskip.policies.fixed import FixedPolicy\n\n\n"
        "class Mine(FixedPolicy):\n    def __init__(self, num_blocks):\n        super().__init__(num_blocks)\n"
        "        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]\n"
    )
    run = shutil.copytree(Path(__file__).parent / "stored/runs/best_static", folder / "run")
    content = json.loads((run / "policy.json").read_bytes())
    content["policy"]["name"] = "my_policies.Mine"
    (run / "policy.json").write_text(json.dumps(content))
    assert policyskip.load(run, trust=True).policy.rates == [0, 0.5, 1]
    content["policy"]["arguments"] = {"num_blocks": 3}
    (run / "policy.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="num_blocks: the network has 15, got 3"):
        policyskip.load(run, trust=True)
