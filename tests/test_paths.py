"""Folders and files whose names have spaces and letters of any language, in any locale."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from policyskip.files import shell_argument as words_for
from tests.conftest import typed, without_waits

SMALL = ["device=cpu", "data=imagefolder", "data.root='bilder ü'", "data.batch_size=8", "train.steps=2"]
COMMANDS = [
    ["pretrain", *SMALL, "backbone=resnet20", "tracking=none", "run.dir='netz é 1'"],
    ["train", "+experiment=debug", *SMALL, "~data.train", "~data.validation", "~data.test", "tracking=wandb",
     "tracking.mode=offline", "backbone=resnet20", "backbone.checkpoint='netz é 1/backbone.safetensors'", "run.dir='läuf é 1'"],
    ["train", "run.resume='läuf é 1'", "train.steps=4"],
    ["evaluate", "run='läuf é 1'", "device=cpu"],
    ["compare", "runs='läuf é 1'", "output='vergleich 中'", "tracking=none"],
]  # fmt: skip
LOAD = "import policyskip, torch; policyskip.load('läuf é 1').predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of a difficult name, with images of difficult names."""
    folder = tmp_path / "wörk 中 spàce"
    for split, count in (("train", 12), ("test", 6)):
        for number, name in enumerate(("ä b", "c")):
            (folder / "bilder ü" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(100 * number + i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "bilder ü" / split / name / f"bild {i} é.png")
    return folder


def check(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """From a network to a comparison."""
    for words in COMMANDS:
        result = run(*words)
        assert result.returncode == 0 and not without_waits(result.stderr), (
            f"{words}\n{result.stdout[-999:]}\n{result.stderr}"
        )
        if words[0] == "pretrain":
            assert "\"backbone.checkpoint='netz é 1/backbone.safetensors'\"" in result.stdout
        if words[0] == "evaluate":
            assert "Every figure is that of summary.json" in result.stdout


def test_paths_of_any_letters(folder):
    check(lambda *words: typed(*words, cwd=folder, drawn=True))


@pytest.mark.slow
def test_paths_of_any_letters_where_the_locale_is_ascii(folder):
    own = {"LC_ALL": "C", "PYTHONUTF8": "0", "XDG_CACHE_HOME": str(folder.parent), "COLUMNS": "200"}
    own |= {"MPLCONFIGDIR": matplotlib.get_cachedir(), "PYTHONPATH": str(Path(__file__).parents[1])}
    options = dict(cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, encoding="utf-8")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], **options)

    check(lambda *words: run("-m", "policyskip", *words))
    (folder / "load.py").write_text(LOAD, encoding="utf-8")
    assert run("load.py").returncode != 0  # Python itself cannot name the folder: not ours to mend
    assert run("-X", "utf8", "load.py").returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "runs/x-seed=0",
        "a/b@c%d+e-f_g.h",
        "läuf é 1",
        "it's",
        "a\\'b",
        "ends in \\",
        'a "b"',
        "a b!",
        "50 %, (1)",
        "x:y",
    ],
)
def test_what_is_printed_can_be_typed(name):
    (word,) = shlex.split(words_for("run.resume", Path(name)))
    override = OverridesParser.create().parse_override(word)
    assert override.key_or_group == "run.resume" and str(override.value()) == name
