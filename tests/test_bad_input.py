"""What a user can get wrong on the command line: each ends in one or two lines, exit code 2, and nothing lost.

The commands run in this process, as ``policyskip.cli.main`` would be run by the shell; one test runs the real thing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import policyskip
from policyskip.backbones import Backbone, cifar_resnet
from policyskip.backbones.checkpoints import save
from policyskip.backbones.resnet import CifarResNet
from policyskip.errors import UserError
from tests.conftest import typed

SMALL = [
    *("data.train=200", "data.validation=60", "data.test=60", "data.batch_size=32", "device=cpu", "tracking=none"),
    *(
        "train.steps=2",
        "train.validate_every=1",
        "train.log_every=1",
        "backbone=resnet20",
        "backbone.checkpoint=random",
    ),
]
TRAIN = [*SMALL, "agent.width=4", "front.budget=4e3", "front.images=20"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    """Every test starts in an empty folder, with nothing remembered from the one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    return tmp_path


def run(*arguments: str) -> int:
    """The exit code of ``policyskip`` with these arguments."""
    result = typed(*arguments, cwd=Path.cwd(), drawn="data.root=photos" in arguments)
    print(result.stdout, end="")
    print(result.stderr, end="", file=sys.stderr)
    return result.returncode


@pytest.fixture
def refused(capsys, empty_folder) -> Callable[..., str]:
    """Run a command that must be refused, and leave the current folder as it is; what it says."""

    def refuse(*arguments: str) -> str:
        before = contents(empty_folder)
        capsys.readouterr()
        code = run(*arguments)
        printed, errors = capsys.readouterr()
        assert code == 2
        lines = [line for line in errors.splitlines() if line.strip()]
        assert 1 <= len(lines) <= 2 and lines[0].startswith("policyskip")
        assert "Traceback" not in printed + errors
        assert contents(empty_folder) == before
        return errors

    return refuse


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with what is in it."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(paths)}


def test_the_installed_command_refuses_without_a_trace(tmp_path):
    for arguments, message in (
        (
            ["fly"],
            "there is no command 'fly'; it is one of train, pretrain, evaluate, calibrate, profile, compare, front",
        ),
        (["train", "agent=blockdrup"], "there is no agent/blockdrup; agent is one of a2c, best_static, blockdrop"),
    ):
        command = [sys.executable, "-m", "policyskip", *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and result.stdout == ""
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert contents(tmp_path) == {}


def test_the_settings_of_these_tests_are_good(empty_folder, capsys):
    """So that what is refused below is refused for the one argument that is wrong."""
    assert run("train", *TRAIN, "run.dir=runs/x") == 0
    assert capsys.readouterr().err == ""
    assert {path.name for path in empty_folder.iterdir()} == {"runs"}  # no log, no outputs folder


WRONG = {
    # the command, groups and keys
    "fly": "there is no command 'fly'; it is one of train, pretrain, evaluate, calibrate, profile, compare, front",
    "train agent=blockdrup": "there is no agent/blockdrup; agent is one of a2c, best_static, blockdrop",
    "train backbone=resnet21": r"there is no backbone/resnet21; backbone is one of .*resnet20",
    "train data=cifar11": "there is no data/cifar11; data is one of .*cifar10,",
    "train reward=gold": "there is no reward/gold; reward is one of .*utilization",
    "train tracking=paper": "there is no tracking/paper; tracking is one of none, wandb",
    "train experiment=debug": r"experiment",
    "train +experiment=none_such": "there is no experiment/none_such; experiment is one of branchynet_cifar10, .*debug",
    "train agents=blockdrop": "there is no key agents; there are agent, backbone,",
    "train agent=3": "there is no agent/3; agent is one of a2c",
    "train agent=null": "there is no agent/null; agent is one of a2c",
    "train ~reward": "the configuration has no reward, and this command needs one",
    "train stepz=3": "there is no key stepz; there are .*seed",
    "train train.stepz=3": "there is no key train.stepz; train has choose_after, log_every, steps, validate_every",
    "train agent.gamma=3": "there is no key agent.gamma; agent has alpha, alpha_end, baseline, beta,",
    "train +agent.gamma=3": "agent has no key gamma; .* takes lr, schedule,",
    "train +train.stepz=3": "there is no key train.stepz",
    "train seed=[1": r"seed=\[1 cannot be read",
    # values of the wrong type
    "train seed=one": "seed: input should be a valid integer, got 'one'",
    "train seed=1.5": "seed: input should be a valid integer, got 1.5",
    "train train.steps=many": "train.steps: input should be a valid integer, got 'many'",
    "train train=3": "train: input should be a valid dictionary .*got 3",
    "train agent.lr=fast": "agent.lr: input should be a valid number, got 'fast'",
    "train agent.samples=2.5": "agent.samples: input should be a valid integer, got 2.5",
    "train data.train=many": "data.train: input should be a valid integer, got 'many'",
    "train data.batch_size=big": "data.batch_size must be a positive integer, got 'big'",
    "train reward.penalty=much": "reward.penalty: input should be a valid number, got 'much'",
    "train run.dir=null": "run.dir must be a folder to make, got None",
    # values out of range
    "train seed=-1": "seed: input should be greater than or equal to 0, got -1",
    "train seed=99999999999999999999": "seed: input should be less than",
    "train train.steps=0": "train.steps must be at least 1, got 0",
    "train train.validate_every=0": "train.validate_every: input should be greater than 0, got 0",
    "train train.log_every=-5": "train.log_every: input should be greater than 0, got -5",
    "train agent.alpha=0.5": "agent.alpha and agent.alpha_end must be above 0.5 and at most 1, got 0.5 and 0.98",
    "train agent.lr=-1": "agent.lr positive .* got 3, 0.0, -1",
    "train agent.lr=nan": "agent: .*nan",
    "train agent.samples=0": "agent.samples must be at least 1",
    "train agent.curriculum=2": r"agent.curriculum in \[0, 1\]",
    "train agent.width=0": "agent.width and agent.pool must be at least 1",
    "train agent.warm_start=hot": "agent.warm_start must be true or false, got 'hot'",
    "train agent.pool=99": "agent: .*too small",
    "train agent.policy=oracle": "agent.policy: input should be 'cifar', 'imagenet' or 'constant', got 'oracle'",
    "train agent.schedule=none": "agent.schedule: input should be 'onecycle' or 'constant', got 'none'",
    "train data.train=0": "data.train must be at least 1 image, and at most 2,000,000, got 0",
    "train data.batch_size=0": "data.batch_size must be a positive integer, got 0",
    "train backbone.depth=21": r"depth must be 6n\+2 .* got 21",
    "train backbone.width=0": "width must be at least 1, .* got 0",
    "train backbone.std=[0,0,0]": "those of std positive",
    "train backbone.shortcut=C": "backbone.shortcut: input should be 'A', 'pool' or 'B', got 'C'",
    "train front.budget=-1": "front.budget: input should be greater than or equal to 0, got -1",
    "train front.images=0": "front.images: input should be greater than 0, got 0",
    "train front.seconds=-1": "front.seconds: input should be greater than or equal to 0, got -1",
    "train tracking.mode=paper": "tracking.mode: input should be 'auto', 'online', 'offline' or 'none', got 'paper'",
    # what is not there
    "train device=cuda:77": r"device cuda:77 is not there: this machine has \d+ CUDA devices; say device=cpu",
    "train device=tpu": "device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    "train device=meta": "device must be auto, cpu, cuda or cuda:N, got 'meta'",
    "train backbone.checkpoint=null": r"backbone\.checkpoint is not set, and a ResNet-\d+ needs weights: give a file",
    "train backbone.checkpoint=net.pth": "there is no checkpoint net.pth: neither a file nor one of .*resnet32_digits",
    "train reward._target_=my_rewards.Mine": "could not import .*my_rewards.Mine: .*No module named 'my_rewards'",
    "train reward._target_=mine": "reward._target_=mine is no installed reward",
    "train reward._target_=math.pi": "reward._target_=math.pi is no class or function",
    "train reward=custom": "reward._target_ is not set",
    "train run.dir=.": "run.dir=. is no folder of its own",
    "train data.root=ö": r"data.root=ö cannot be read; unusual letters go in quotes",
    "train reward=budget reward.rate=nan": "reward.rate must be a number from",
    "train reward=budget reward.multiplier=inf": "reward.multiplier must be a number from",
    "train run.resume=nowhere": "the run folder nowhere does not exist",
    "train run.resume=.": "the run folder . is not a run folder: it has no config.yaml",
}  # fmt: skip
OTHER_COMMANDS = {
    "pretrain pretrain.survival=0": r"pretrain.survival must be in \(0, 1\]",
    "pretrain pretrain.stochastic_depth=some": "stochastic_depth: input should be 'none', 'linear' or 'uniform'",
    "pretrain pretrain.speed=3": "there is no key pretrain.speed; pretrain has lr,",
    "pretrain backbone=torchvision_resnet18": "pretrain trains CIFAR ResNets, not torchvision_resnet18",
    "pretrain backbone=msdnet_digits": "pretrain trains CIFAR ResNets, not msdnet5",
    "pretrain backbone=msdnet_digits backbone.stem=mnist": "backbone.stem: input should be 'cifar' or 'imagenet'",
    "pretrain backbone=branchy_lenet backbone.channels=2": r"channels must be 1 \(grey\) or 3, got 2",
    "pretrain backbone=resnet32_exits backbone.exits=[2,14]": "block 14 is the last of resnet32: .* blocks 0 to 13",
    "pretrain backbone=resnet32_exits backbone.exits=5": "backbone.exits: input should be a valid list, got 5",
    "pretrain run.resume=nowhere": "the run folder nowhere does not exist",
    "front output=3": "output must be the name of a folder or file, got 3; .* output=./3",
}
ALONE = {
    "compare runs=": "runs= names no folder",
    "evaluate": "run is not set; add run=… to the command",
    "evaluate run=nowhere": "the run folder nowhere does not exist",
    "evaluate run=.": "the run folder . is not a run folder: it has no config.yaml",
    "evaluate run=nowhere thrust=true": "there is no key thrust; there are device, .*split, trust",
    "train data=imagefolder": "data.root is not set; add data.root=… to the command",
    "train data=imagefolder data.root=nowhere": "there is no folder 'nowhere'; data.root must hold",
    "train backbone=cifar_resnet": "backbone.depth is not set; add backbone.depth=… to the command",
}


@pytest.mark.parametrize(("typed", "message"), WRONG.items(), ids=WRONG.keys())
def test_train_refuses(refused, typed, message):
    command, *wrong = typed.split(" ")
    said = refused(command, *TRAIN, *wrong)
    assert re.search(message, said), said


@pytest.mark.parametrize(("typed", "message"), OTHER_COMMANDS.items(), ids=OTHER_COMMANDS.keys())
def test_pretrain_and_front_refuse(refused, typed, message):
    command, *wrong = typed.split(" ")
    small = [word for word in SMALL if command != "front" or not word.startswith(("train.", "tracking"))]
    said = refused(command, *small, *wrong)
    assert re.search(message, said), said


@pytest.mark.parametrize(("typed", "message"), ALONE.items(), ids=ALONE.keys())
def test_what_is_not_set_or_not_there_is_named(refused, typed, message):
    said = refused(*typed.split(" "))
    assert re.search(message, said), said


# Folders of images


def write_photographs(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(root / split / name / f"{i}.png")


def test_good_photographs_are_taken(empty_folder):
    """So that the next test's are refused for what is wrong with them."""
    write_photographs(empty_folder / "photos")
    assert run("train", *FOLDERS, "run.dir=runs/x") == 0


FOLDERS = [
    *(
        "device=cpu",
        "tracking=none",
        "train.steps=1",
        "front.budget=4e3",
        "agent.width=4",
        "agent.pool=1",
    ),
    *("data=imagefolder", "data.root=photos", "backbone=resnet20", "backbone.checkpoint=random"),
]


@pytest.mark.parametrize("what", ["empty", "empty train", "one class", "empty class", "unreadable"])
def test_bad_photographs_are_refused(refused, empty_folder, what):
    root = empty_folder / "photos"
    if what == "empty":
        root.mkdir()
        expected = "there is no folder photos/train"
    elif what == "empty train":
        (root / "train").mkdir(parents=True)
        expected = "photos/train holds no class folders"
    elif what == "one class":
        write_photographs(root, ("cat",))
        expected = "photos/train has one class, cat; at least two are needed"
    else:
        write_photographs(root)
        file = root / "train" / "dog" / "2.png"
        if what == "unreadable":
            file.write_bytes(b"no image")
            expected = "cannot read the image photos/train/dog/2.png"
        else:
            shutil.rmtree(root / "train" / "dog")
            (root / "train" / "dog").mkdir()
            expected = "the class folder photos/train/dog holds no images"
    assert expected in refused("train", *FOLDERS)


# Checkpoints


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (dict(depth=14, num_classes=10), "net.safetensors holds a ResNet of depth 14, not of depth 20"),
        (dict(depth=20, num_classes=5), "net.safetensors has 5 classes, the data has 10"),
        (None, "cannot read net.safetensors as weights"),
    ],
    ids=["depth", "classes", "damaged"],
)
def test_checkpoints_that_do_not_fit_are_refused(refused, empty_folder, made, message):
    file = empty_folder / "net.safetensors"
    if made:
        save(CifarResNet(**made, width=4), file)
    else:
        file.write_bytes(b"\x08\0\0\0\0\0\0\0{ no JSON")
    assert message in refused("train", *TRAIN, "backbone.checkpoint=net.safetensors")
    if made and made["depth"] == 20:
        save(CifarResNet(20, 10, width=4), file)
        assert run("train", *TRAIN, "backbone.checkpoint=net.safetensors", "run.dir=runs/x") == 0


# Rewards

REWARDS = {
    "a scalar": (
        "return outcome.macs_B.mean()",
        r"the reward Mine must return a float tensor of shape \(32,\), not float64 of",
    ),
    "a column": ("return outcome.macs_B.unsqueeze(1)", r"shape \(32,\), not float64 of shape \(32, 1\)"),
    "whole numbers": ("return outcome.label_B", r"shape \(32,\), not int64 of shape \(32,\)"),
    "no tensor": ("return 1.0", r"the reward Mine must return a float tensor of shape \(32,\), not float"),
    "nothing": ("pass", "the reward Mine must return a float tensor .* not None"),
    "NaN": ("return outcome.macs_B * float('nan')", "the reward Mine returned 32 non-finite values of 32, such as nan"),
    "infinity": ("return outcome.macs_B / 0", "the reward Mine returned 32 non-finite values of 32, such as inf"),
    "an exception": ("raise RuntimeError('no gold')", "the reward Mine raised RuntimeError: no gold"),
}
REWARD = """
from pathlib import Path

Path("imported").touch()


class Mine:
    def __init__(self, beta: float = 1.0) -> None:
        if beta < 0:
            raise IndexError("beta is below zero")
        self.beta = beta

    def __call__(self, outcome):
        {body}
"""
GOOD_REWARD = REWARD.format(body="return self.beta * outcome.correct_B.float()")


@pytest.mark.parametrize(("body", "message"), REWARDS.values(), ids=REWARDS.keys())
def test_rewards_that_misbehave_are_refused_before_there_is_a_run_folder(refused, empty_folder, body, message):
    (empty_folder / "imported").touch()
    (empty_folder / "my_rewards.py").write_text(REWARD.format(body=body))
    said = refused("train", *TRAIN, "reward._target_=my_rewards.Mine")
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward.beta=-1"], "reward: my_rewards.Mine failed with IndexError: beta is below zero"),
        (["reward.beta=much"], "reward.beta: input should be a valid number, got 'much'"),
        (["reward.penalty=1"], "reward has no key penalty; my_rewards.Mine takes beta"),
        (["reward._target_=my_rewards.Yours"], "could not import reward._target_=my_rewards.Yours: AttributeError"),
    ],
)
def test_wrong_arguments_of_a_reward_are_named(refused, empty_folder, arguments, message):
    (empty_folder / "imported").touch()
    (empty_folder / "my_rewards.py").write_text(GOOD_REWARD)
    assert message in refused("train", *TRAIN, "reward._target_=my_rewards.Mine", *arguments)


def test_a_reward_that_cannot_be_imported_is_named(refused, empty_folder):
    (empty_folder / "my_rewards.py").write_text("import nothing_of_this_name\n")
    said = refused("train", *TRAIN, "reward._target_=my_rewards.Mine")
    assert "could not import reward._target_=my_rewards.Mine: ModuleNotFoundError: No module named 'nothing_of" in said


def test_a_reward_of_one_s_own_takes_its_own_keys(empty_folder):
    (empty_folder / "my_rewards.py").write_text(GOOD_REWARD)
    assert run("train", *TRAIN, "reward._target_=my_rewards.Mine", "reward.beta=3", "run.dir=runs/x") == 0
    saved = yaml.safe_load((empty_folder / "runs/x/config.yaml").read_text())
    assert saved["reward"] == {"_target_": "my_rewards.Mine", "beta": 3}
    assert '"test/reward": 0.' in (empty_folder / "runs/x/summary.json").read_text().replace("-", "")


# Run folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert run("train", *TRAIN, "run.dir=x") == 0
    yield folder / "x"


@pytest.fixture
def copied(trained, empty_folder) -> Path:
    """A copy of the finished run that a test may damage, at ``x``."""
    return shutil.copytree(trained, empty_folder / "x")


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def change_config(folder: Path, **changes) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))


def drop_from_config(folder: Path, key: str) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config[key]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


CONFIG_DAMAGE = {
    "no YAML": (lambda run: (run / "config.yaml").write_text("a: [b"), r"x/config\.yaml is damaged"),
    "binary": (lambda run: (run / "config.yaml").write_bytes(b"\xff\0\xfe"), r"x/config\.yaml is damaged"),
    "a list": (lambda run: (run / "config.yaml").write_text("- a\n- b\n"), "x/config.yaml is damaged or not ours"),
    "empty": (lambda run: (run / "config.yaml").write_text(""), "the configuration has no data|seed"),
    "a section that is a list": (
        lambda run: change_config(run, run=[1]),
        r"x/config\.yaml is damaged|run: input should be",
    ),
    "of another command": (lambda run: drop_from_config(run, "reward"), "the configuration has no reward"),
}


def test_the_run_of_these_tests_is_good(copied, capsys):
    assert run("evaluate", "run=x", "device=cpu") == 0
    assert "Every figure is that of summary.json." in capsys.readouterr().out
    assert run("train", "run.resume=x", "train.steps=3") == 0
    assert policyskip.load("x").predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8)).keep_BK.shape == (2, 9)


@pytest.mark.parametrize(("damage", "message"), CONFIG_DAMAGE.values(), ids=CONFIG_DAMAGE.keys())
def test_a_damaged_configuration_is_refused_and_nothing_is_lost(refused, copied, damage, message):
    damage(copied)
    for arguments in (("evaluate", "run=x", "device=cpu"), ("train", "run.resume=x", "train.steps=3")):
        said = refused(*arguments)
        assert re.search(message, said), said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "best.safetensors").unlink(),
            "there is no x/best.safetensors; the run did not get that far",
        ),
        (lambda run: halve(run / "best.safetensors"), "x/best.safetensors is damaged or not ours"),
        (
            lambda run: change_config(run, agent={"_target_": "policyskip.agents.blockdrop.BlockDrop", "width": 8}),
            "x/best.safetensors does not fit the run's config.yaml",
        ),
        (
            lambda run: change_config(run, device="nowhere", data={"_target_": "policyskip.data.digits", "train": 0}),
            "train",
        ),
    ],
    ids=["missing", "halved", "of another policy", "impossible data"],
)
def test_evaluate_refuses_a_damaged_run(refused, copied, damage, message):
    damage(copied)
    assert message in refused("evaluate", "run=x", "device=cpu")


@pytest.mark.parametrize("argument", ["split=exam", "device=cuda:77"])
def test_evaluate_refuses_what_it_cannot_do(refused, copied, argument):
    assert argument.partition("=")[2] in refused("evaluate", "run=x", argument)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["reward.penalty=2"],
            "reward.penalty cannot change when a run is resumed; only run.trust, train.steps, device, tracking",
        ),
        (["agent=blockdrop"], "agent cannot change when a run is resumed"),
        (["train.steps=few"], "train.steps: input should be a valid integer, got 'few'"),
        (["device=cuda:77"], "device cuda:77 is not there"),
    ],
)
def test_a_resumed_run_does_not_change_its_task(refused, copied, changes, message):
    assert message in refused("train", "run.resume=x", *changes)


def test_pretrain_does_not_go_on_with_a_policy(refused, copied):
    assert "x is a run of train; go on with:  policyskip train run.resume=x" in refused("pretrain", "run.resume=x")


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("marker", "w")


@pytest.mark.parametrize("content", ["half", "bomb", "other"])
def test_a_damaged_training_checkpoint_is_refused(refused, copied, content):
    file = copied / "checkpoint.pt"
    if content == "half":
        halve(file)
    else:
        torch.save(Bomb() if content == "bomb" else {"weights": torch.zeros(3)}, file)
    assert "x/checkpoint.pt is damaged or not ours" in refused("train", "run.resume=x", "train.steps=3")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.yaml", Path.unlink, "the run folder x is not a run folder: it has no config.yaml"),
        ("policy.json", Path.unlink, r"there is no x/policy\.json; the run did not get that far"),
        ("policy.json", halve, r"x/policy\.json is damaged or not ours"),
        ("policy.json", lambda file: file.write_text("[]"), r"x/policy\.json is damaged: it holds no JSON object"),
        ("policy.json", lambda file: file.write_text("{}"), r"x/policy\.json is damaged or of another version"),
        ("best.safetensors", halve, r"x/best\.safetensors is damaged or not ours"),
        (
            "policy.json",
            lambda file: file.write_text(file.read_text().replace('"width": 4', '"width": 8')),
            r"x/best\.safetensors does not fit policy\.json",
        ),
        (
            "policy.json",
            lambda file: file.write_text(file.read_text().replace("policyskip.backbones.cifar_resnet", "os.system")),
            r"this network is os\.system, which is not installed here",
        ),
        (
            "policy.json",
            lambda file: file.write_text(
                file.read_text().replace("backbones.cifar_resnet", "backbones.checkpoints.save")
            ),
            r"x/policy\.json is damaged or of another version: .*checkpoints\.save is no network",
        ),
        (
            "policy.json",
            lambda file: file.write_text(file.read_text().replace('"depth": 20', '"deepness": 20')),
            r"x/policy\.json is damaged or of another version",
        ),
    ],
    ids=[
        "no run",
        "absent",
        "halved",
        "a list",
        "empty",
        "weights halved",
        "other policy",
        "other function",
        "function of ours",
        "other key",
    ],
)
def test_load_refuses_a_damaged_run(copied, file, damage, message):
    damage(copied / file)
    with pytest.raises(UserError, match=message) as refused:
        policyskip.load("x")
    assert "\n" not in str(refused.value)


def test_load_refuses_arguments_of_another_type(copied):
    for arguments in ({"backbone": 3}, {"trust": "yes"}, {"planned": None}):
        with pytest.raises(UserError, match=f"{next(iter(arguments))} must be of type"):
            policyskip.load("x", **arguments)


def test_load_says_what_is_not_there(copied):
    with pytest.raises(UserError, match="the run folder nowhere does not exist"):
        policyskip.load("nowhere")
    with pytest.raises(UserError, match=r"there is no checkpoint moved\.safetensors"):
        policyskip.load("x", backbone="moved.safetensors")


def test_a_run_folder_that_cannot_be_made_is_named(refused, empty_folder):
    (empty_folder / "file").touch()
    assert "run.dir cannot be below file, which is no folder" in refused("train", *TRAIN, "run.dir=file/x")


# Run folders of others

FOREIGN = {
    "reward": {"_target_": "my_rewards.Mine"},
    "reward of the system": {"_target_": "os.mkdir", "path": "marker"},
    "data": {"_target_": "os.mkdir", "path": "marker"},
    "backbone": {"_target_": "os.mkdir", "path": "marker"},
    "env": {"_target_": "os.mkdir", "path": "marker"},
    "agent": {"_target_": "os.mkdir", "path": "marker"},
    "agent by way of ours": {
        "_target_": "policyskip.build.build",
        "group": "agent",
        "node": {"_target_": "os.mkdir", "path": "marker"},
    },
    "reward by way of what ours imports": {"_target_": "policyskip.runs.folder.os.mkdir", "path": "marker"},
    "reward that is an agent": {
        "_target_": "policyskip.runs.folder.create",
        "folder": "marker",
        "command": "",
        "config": "",
    },
}


@pytest.mark.parametrize(("what", "node"), FOREIGN.items(), ids=FOREIGN.keys())
def test_nothing_that_a_run_folder_names_is_executed(refused, copied, empty_folder, what, node):
    (empty_folder / "my_rewards.py").write_text(GOOD_REWARD)
    group = what.split(" ")[0]
    trusting = {"dir": "x", "resume": None, "trust": True}  # what the folder says of itself
    change_config(copied, run=trusting, **{group: node})
    for arguments in (("evaluate", "run=x", "device=cpu"), ("train", "run.resume=x", "train.steps=3")):
        said = refused(*arguments)
        assert f"the run's {group} {node['_target_']} is not one of policyskip's own; say trust=true" in said
    assert not (empty_folder / "marker").exists() and not (empty_folder / "imported").exists()


@pytest.mark.parametrize("group", ["data", "backbone", "pretrain"])
def test_nothing_that_a_pretrain_folder_names_is_executed(refused, empty_folder, group):
    assert run("pretrain", *SMALL, "backbone.width=4", "run.dir=x") == 0
    assert run("pretrain", "run.resume=x") == 0
    change_config(empty_folder / "x", **{group: {"_target_": "os.mkdir", "path": "marker"}})
    said = refused("pretrain", "run.resume=x", "train.steps=3")
    assert f"the run's {group} os.mkdir is not one of policyskip's own" in said


def test_a_trusted_run_folder_may_bring_its_own_reward(copied, empty_folder):
    (empty_folder / "my_rewards.py").write_text(GOOD_REWARD)
    change_config(copied, reward=FOREIGN["reward"])
    assert run("evaluate", "run=x", "device=cpu", "trust=true") == 0
    assert (empty_folder / "imported").exists()
    assert run("train", "run.resume=x", "run.trust=true", "train.steps=3") == 0


ODD_PARTS = """
import sys
import numpy
import torch
from policyskip.backbones import cifar_resnet
from policyskip.data import Data, TensorImages
from policyskip.agents.base import Agent
from policyskip.agents.skipnet import SkipNet
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.policies.fixed import FixedPolicy

class Good(Agent):
    def __init__(self, env): self.policy, self.decision_macs = FixedPolicy(env.backbone.num_blocks), 0.0
    def update(self, env): return {"reward": 0.0}
    def state_dict(self): return {"policy": self.policy.state_dict()}
    def load_state_dict(self, state): pass

class OddFamily(Good): family = "odd"
class NoEnvironments(Good): environments = None
class OneString(Good): environments = "block_selection"
class NoPolicy(Good):
    def __init__(self, env): self.decision_macs = 0.0
class NoMacs(Good):
    def __init__(self, env): self.policy = FixedPolicy(env.backbone.num_blocks)
class MacsText(Good):
    def __init__(self, env): super().__init__(env); self.decision_macs = "x"
class Numpy(Good):
    def state_dict(self): return {"a": [numpy.zeros(3)]}
class NoState(Good):
    def state_dict(self): return None
class Leaving(Good):
    def __init__(self, env): sys.exit(0)
class Wrong(FixedPolicy):
    def spec(self): return {"zzz": 3}
class WrongSpec(Good):
    def __init__(self, env): self.policy, self.decision_macs = Wrong(env.backbone.num_blocks), 0.0
class NoJson(FixedPolicy):
    def spec(self): return {"num_blocks": lambda: 3}
class NoJsonSpec(Good):
    def __init__(self, env): self.policy, self.decision_macs = NoJson(env.backbone.num_blocks), 0.0
class Narrow(FixedPolicy):
    def decide(self, images): return super().decide(images)[:, :3]
class NarrowDecisions(Good):
    def __init__(self, env): self.policy, self.decision_macs = Narrow(env.backbone.num_blocks), 0.0
class Failing(FixedPolicy):
    def decide(self, images): raise IndexError("no such block")
class FailingDecisions(Good):
    def __init__(self, env): self.policy, self.decision_macs = Failing(env.backbone.num_blocks), 0.0
class NoFigures(Good):
    def update(self, env): env.advance()
class WideFigure(Good):
    def update(self, env): return {"loss": 0.5, "gain": torch.zeros(3)}
class UpdateLeaves(Good):
    def update(self, env): sys.exit(0)

class OddEnv(BlockSelectionVectorEnv): family = "odd"
def no_env(backbone, images): return None
def five_classes(): return cifar_resnet(5, 20, "random")

class OneMore(torch.nn.Module):
    def __init__(self, head): super().__init__(); self.head = head
    def forward(self, x): return torch.nn.functional.pad(self.head(x), (0, 1))
def one_logit_more(num_classes):
    network = cifar_resnet(num_classes, 20, "random")
    network.head = OneMore(network.head)
    return network

def floats(device):
    split = TensorImages(torch.zeros(60, 3, 20, 20), torch.arange(60) % 2)
    return Data("odd", split, split, split, ("a", "b"), (3, 20, 20))

def plain_reward(outcome): return outcome.correct_B.float()
def unannotated(env): return Good(env)
class ShortReturns(SkipNet):
    def returns(self, ce_B, run): return super().returns(ce_B, run)[:, 1:]

def more_labels(device):
    split = TensorImages(torch.zeros(60, 3, 20, 20, dtype=torch.uint8), torch.arange(60) % 4)
    return Data("odd", split, split, split, ("a", "b"), (3, 20, 20))
"""


@pytest.mark.parametrize(
    "argument, message",
    [
        ("agent._target_=null", "agent._target_ must name a class or function as package.module.Name, got None"),
        ("agent._target_=odd.OddFamily", "OddFamily must declare a family of blocks, gates, .*, or None, got 'odd'"),
        ("agent._target_=odd.NoEnvironments", "must declare environments, a tuple of names, got None"),
        ("agent._target_=odd.OneString", "must declare environments, a tuple of names, got 'block_selection'"),
        ("agent._target_=odd.NoPolicy", "must set policy to a policyskip.policies.base.Policy, got NoneType"),
        ("agent._target_=odd.NoMacs", "must set decision_macs to the MACs of one decision, a number, got None"),
        ("agent._target_=odd.MacsText", "must set decision_macs to the MACs of one decision, a number, got 'x'"),
        ("agent._target_=odd.Numpy", r"state_dict of the agent Numpy must .*; got ndarray in state_dict\['a'\]\[0\]"),
        ("agent._target_=odd.NoState", "state_dict of the agent NoState must .*; got NoneType"),
        ("agent._target_=odd.Leaving", "agent: odd.Leaving failed with SystemExit: 0"),
        ("agent._target_=sys.exit", "agent: sys.exit failed with SystemExit"),
        ("agent._target_=leaving.X", "could not import agent._target_=leaving.X: SystemExit: 0"),
        ("agent._target_=odd.WrongSpec", "spec of the policy Wrong must return the arguments of Wrong"),
        ("agent._target_=odd.NoJsonSpec", "spec of the policy NoJson must return the arguments of NoJson"),
        (
            "agent._target_=odd.NarrowDecisions",
            r"narrowdecisions must decide with a tensor torch\.bool \(\d+, 9\) here, got torch\.bool \(\d+, 3\)",
        ),
        ("agent._target_=odd.FailingDecisions", "the agent failingdecisions failed with IndexError: no such block"),
        ("env._target_=odd.OddEnv", "the environment OddEnv must declare a family of .*, got 'odd'"),
        ("env._target_=odd.no_env", "env._target_=odd.no_env gave a NoneType; it must be a .*DecisionEnv"),
    ],
)
def test_odd_parts_are_refused_before_there_is_a_run_folder(refused, empty_folder, monkeypatch, argument, message):
    (empty_folder / "odd.py").write_text(ODD_PARTS)
    (empty_folder / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    for module in ("odd", "leaving"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    typed_settings = [word for word in TRAIN if not word.startswith("agent.") or "env" in argument]
    assert re.search(message, refused("train", *typed_settings, argument))


def test_a_network_of_other_classes_is_refused(refused, empty_folder, monkeypatch):
    (empty_folder / "odd.py").write_text(ODD_PARTS)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    settings = [word for word in TRAIN if not word.startswith("backbone")]
    message = "backbone._target_=odd.five_classes gave a network of 5 classes, the data has 10"
    assert message in refused("train", *settings, "backbone._target_=odd.five_classes")


def test_what_a_part_returned_is_named_where_the_package_stumbles_over_it(empty_folder, monkeypatch, capsys):
    (empty_folder / "odd.py").write_text(ODD_PARTS)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    monkeypatch.delenv("POLICYSKIP_TRACEBACK", raising=False)
    settings = [word for word in TRAIN if not word.startswith("agent.")]
    agent = (
        "agent=skipnet",
        "agent.gate=rnn",
        "agent._target_=odd.ShortReturns",
        "agent.supervised=0",
        "run.dir=runs/x",
    )
    assert run("train", *settings, *agent) == 2
    said = capsys.readouterr().err
    assert "ValueError: expected cross-entropy (B,)" in said and said.count("\n") <= 2
    assert "classes of your own (agent: odd.ShortReturns" in said and "POLICYSKIP_TRACEBACK=1" in said


@pytest.mark.parametrize(
    "argument, message",
    [
        ("backbone._target_=odd.one_logit_more", r"gave logits \(2, 11\) for two images, not \(2, 10\)"),
        ("data._target_=odd.floats", r"images must be uint8, 0 to 255, got a Tensor of float32 \(60, 3, 20, 20\)"),
        ("reward._target_=odd.plain_reward", "reward.outcome is not set; .* a reward is a class with __call__"),
        ("agent._target_=odd.unannotated", "at least 1, got 0; if the agent has nothing to learn, annotate what una"),
    ],
)
def test_parts_that_are_not_what_their_place_needs_are_refused(refused, empty_folder, monkeypatch, argument, message):
    (empty_folder / "odd.py").write_text(ODD_PARTS)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    settings = [word for word in TRAIN if not word.startswith(argument.partition(".")[0])]
    steps = ["train.steps=0"] if "unannotated" in argument else []
    assert re.search(message, refused("train", *settings, argument, *steps))


def test_stages_sum_to_the_blocks():
    network = cifar_resnet(10, 8, "random")
    with pytest.raises(UserError, match=r"stages \[1\] must sum to the number of blocks, 3"):
        Backbone(network.stem, list(network.blocks), network.head, 10, [0.5] * 3, [0.5] * 3, [1])


def test_labels_without_a_class_are_refused(refused, empty_folder, monkeypatch):
    (empty_folder / "odd.py").write_text(ODD_PARTS)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    settings = [word for word in TRAIN if not word.startswith("data.")]
    assert "data: odd.more_labels gave labels 0 to 3 for 2 classes" in refused(
        "train", *settings, "data._target_=odd.more_labels"
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("NoFigures", "update of nofigures must return numbers by name, a dictionary, got None; no checkpoint"),
        ("WideFigure", "must return numbers by name, got float32 (3,) by the name 'gain'; no checkpoint"),
        ("UpdateLeaves", "agent: odd.UpdateLeaves failed with SystemExit: 0"),
    ],
)
def test_an_update_that_returns_or_does_something_odd_is_reported(empty_folder, monkeypatch, capsys, name, message):
    (empty_folder / "odd.py").write_text(ODD_PARTS)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    settings = [word for word in TRAIN if not word.startswith("agent.")]
    assert run("train", *settings, f"agent._target_=odd.{name}", "run.dir=runs/x") == 2
    assert message in capsys.readouterr().err
