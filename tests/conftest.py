"""Shared paths, and the numpy-made weights and inputs of the reference numbers."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"  # reference numbers, with their own README
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "offline"  # no test may reach for a network
os.environ["OMP_NUM_THREADS"] = "1"  # two small threads that share a busy core wait for each other

SMALL = ["--arch", "small", "--dim", "16", "--image_size", "64", "--audio_seconds", "0.8", "--imagenet_weights", "none"]
SHORT = ["--epochs", "2", "--batch_size", "16", "--lr", "1e-3", "--num_workers", "0", "--gpu", "cpu"]
MEASURED = ("pairs_per_second", "data_wait", "memory_gib")  # of a line of the log: what no other run repeats

import utils  # noqa: E402  (found through the path set above)


def shared_folder(name: str) -> Path:
    """A folder of reference material, or a skip that says why."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the reference material ../shared/{name} is not beside this clone")
    return folder


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory) -> Path:
    """A small synthetic set: 70 training pairs, 10 held out, 20 of each test split (10 interactive pictures)."""
    from synthetic.generate import generate

    root = tmp_path_factory.mktemp("synthetic") / "data"
    counts = {"train": 70, "val": 10, "test": 20, "distractor": 20, "interactive": 10, "offscreen": 20}
    generate(root, seed=0, counts=counts)
    return root


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def cli() -> Callable[..., Finished]:
    """Run a script's main in this process as its command line would: cli("test_model", "--gpu", "cpu")."""

    def run(script: str, *arguments: object) -> Finished:
        stdout, stderr, status = io.StringIO(), io.StringIO(), 0
        argv, folder = sys.argv, os.getcwd()
        sys.argv = [f"{script}.py", *map(str, arguments)]
        os.chdir(ROOT)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                utils.run_cli(importlib.import_module(script).main)
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.argv = argv
            os.chdir(folder)
        return Finished(status, stdout.getvalue(), stderr.getvalue())

    return run


@pytest.fixture(scope="session")
def train(cli):
    """Run train_slot.py on the small synthetic set: train(root, folder, *flags)."""

    def run(root, folder, *arguments):
        data = ["--trainset", "synthetic", "--train_data_path", root, "--test_data_path", root]
        flags = [*data, *SMALL, *SHORT, "--model_dir", folder, "--experiment_name", "run", *arguments]
        return cli("train_slot", *flags)

    return run
