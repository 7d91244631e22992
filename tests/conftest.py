"""Shared paths, and the numpy-made weights and inputs of the reference numbers."""

import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"  # reference numbers, with their own README
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "offline"  # no test may reach for a network
os.environ["OMP_NUM_THREADS"] = "1"  # two small threads that share a busy core wait for each other

SMALL = ["--recipe", "paper", "dim=16", "--arch", "small", "--image_size", "64", "--audio_seconds", "0.8"]
SMALL += ["--imagenet_weights", "none"]
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


@pytest.fixture(scope="session")
def film_root(tmp_path_factory) -> Path:
    """Three synthetic films with their truth; tests only read it."""
    from synthetic.video import generate_films

    root = tmp_path_factory.mktemp("films") / "data"
    generate_films(root, films=3)
    return root


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> list[dict]:
    """{case: result} of either process: one spawn for all cases of `processes.CASES`, whichever worker comes first."""
    import processes
    import torch

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder) / "processes"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "result_1").is_file():
            processes.spawn_two(folder)
    return [torch.load(folder / f"result_{rank}", weights_only=True) for rank in range(2)]


@contextlib.contextmanager
def files_up_to(size: int):
    """No file of this process may grow beyond so many bytes: stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


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


class NotDrawn:
    """In place of `Drawer`, where nobody looks at the contact sheet."""

    def __init__(self, sheet, *_) -> None:
        self.sheet = sheet

    def __call__(self, batch) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.fixture(scope="session")
def train(cli):
    """Run train_slot.py on the small synthetic set: train(root, folder, *flags)."""

    def run(root, folder, *arguments, drawn=False):
        data = ["--trainset", "synthetic", "--train_data_path", root, "--test_data_path", root]
        flags = [*data, *SMALL, *SHORT, "--model_dir", folder, "--experiment_name", "run", *arguments]
        with pytest.MonkeyPatch.context() as patch:
            if not drawn:  # drawing takes longer than the training
                patch.setattr("training.log.plot_curves", lambda lines, path: Path(path).write_bytes(b"not drawn"))
                patch.setattr("training.run.Drawer", NotDrawn)
            return cli("train_slot", *flags)

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small untrained joint-slot model."""
    import torch

    from model_slot import JointSlotModel

    torch.manual_seed(0)
    model = JointSlotModel("small", 16, image_size=64, audio_seconds=0.8)
    state = {"model": model.state_dict(), "model_config": model.config, "epoch": 0, "selected_by": "nothing"}
    path = tmp_path_factory.mktemp("model") / "untrained.pth"
    utils.save_checkpoint(path, state)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The checkpoint files that were read since, in order."""
    import torch

    files, load = [], torch.load

    def count(path, **settings):
        files.append(Path(path))
        return load(path, **settings)

    monkeypatch.setattr(torch, "load", count)
    return files


@pytest.fixture
def damaged(tmp_path):
    """Six pairs: whole, a broken picture, a broken sound, silence, 1 s of sound, a copy of the first."""
    rng = np.random.default_rng(0)
    for folder in ("frames", "audio"):
        (tmp_path / folder).mkdir()
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "frames" / f"{name}.png")
        length = 16000 if name == "e" else 80000
        wave = np.zeros(length) if name == "d" else rng.uniform(-0.5, 0.5, length)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", wave, 16000)
    (tmp_path / "frames" / "b.png").write_bytes(b"")
    (tmp_path / "audio" / "c.wav").write_bytes(b"RIFF")
    with Image.open(tmp_path / "frames" / "a.png") as picture:
        picture.save(tmp_path / "frames" / "f.png", compress_level=1)  # the same picture in another file
    shutil.copy(tmp_path / "audio" / "a.wav", tmp_path / "audio" / "f.wav")
    boxes = [{"file": i, "class": "x", "bbox": [[0.1, 0.1, 0.5, 0.5]]} for i in "abcdefg"]
    boxes[1]["bbox"] = [[-2.9e16, 0, 0.5, 1], [0.5, 0.5, 0.5, 0.9]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return tmp_path


MEASURED_COUNTS = {"train": 100, "val": 20, "test": 150, "distractor": 200, "interactive": 60, "offscreen": 180}


@pytest.fixture(scope="session")
def measured_root(tmp_path_factory) -> Path:
    """A synthetic set of MEASURED_COUNTS, large enough to measure something on; tests only read it."""
    from synthetic.generate import generate

    root = tmp_path_factory.mktemp("measured") / "data"
    generate(root, seed=3, counts=MEASURED_COUNTS)
    return root
