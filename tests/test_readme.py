"""Every command in the README runs, in order, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SET_UP, TESTS, *TOUR = [text for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def place(shapes_bundle: Path, workspace: Path) -> Path:
    """The workspace with this interpreter as its .venv."""
    (workspace / ".venv").symlink_to(sys.prefix)
    return workspace


def _run(script: str, place: Path) -> str:
    environment = os.environ | {"PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_set_up_runs_the_main_job(place: Path) -> None:
    """All but the installation, which CI does for real: it runs the second command to the letter."""
    install, main = SET_UP.split(" && ", 1)[1].split(" && ", 1)
    assert install == ".venv/bin/pip install -c .ci/constraints.txt -e '.[compiler,openvino]'"
    _run(main, place)
    assert Image.open(place / "circles.png").size == (196, 196)


def test_ci_runs_the_readmes_test_command() -> None:
    setup, tests = TESTS.strip().rsplit(" && ", 1)
    script = (ROOT / ".ci" / "run").read_text()
    assert f'setup="{setup}"' in script
    assert f'tests="{tests}"' in script


@pytest.mark.parametrize("number", range(len(TOUR)))
def test_tour(place: Path, number: int) -> None:
    printed = _run(TOUR[number], place)
    assert printed.strip()


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python(place: Path, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PYTHON[number]], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "(7, 8, 9, 10) openvino-cpu-bf16" in done.stdout
    assert Image.open(place / "circle.png").size == (64, 64)


def test_links_lead_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "recipes/models/README.md"):
        text = (ROOT / document).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / document).parent / target).exists(), (document, target)


def test_lists_are_complete() -> None:
    from slipcast.sampling.samplers import SAMPLERS
    from slipcast.sampling.schedules import SCHEDULES

    samplers = re.search(r"^Samplers: (.*)\.$", README, re.MULTILINE)
    assert samplers
    assert set(samplers[1].split(", ")) == set(SAMPLERS)
    schedules = re.search(r"^Schedules: (.*)$", README, re.MULTILINE)
    assert schedules
    assert all(name in schedules[1] for name in SCHEDULES)
    from slipcast_compiler.bench.peers import PEERS

    peers = re.search(r"^Peers: (.*?) or the path", README, re.MULTILINE | re.DOTALL)
    assert peers
    assert set(re.findall(r"`([^`]+)`", peers[1])) == set(PEERS)
