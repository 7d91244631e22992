"""What a container does to a run, without one: another user, a home that cannot be written, a small /dev/shm."""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import endings
import pytest
from conftest import ROOT, SHORT, SMALL

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
UID = re.search(r"useradd --uid (\d+)", DOCKERFILE)[1]
NO_CONTAINER = 77  # status where the system refuses what a container is made of

ENTER = """
mount -t tmpfs -o size="$1" none /dev/shm && mount --bind "$2" "$2" && mount -o remount,ro,bind "$2" || exit 77
shift 2
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups "$@"
"""


@pytest.fixture
def container(synthetic_root):
    """run(size of /dev/shm, script, *arguments) in a folder that its user may write, with the data in it."""
    if not (shutil.which("unshare") and shutil.which("setpriv")) or os.getuid():
        pytest.skip("needs root, unshare and setpriv")
    folder = Path(tempfile.mkdtemp())  # that of pytest is closed to other users
    try:
        (folder / "home").mkdir(mode=0o555)
        shutil.copytree(synthetic_root, folder / "data")
        (folder / "out").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(folder / "out", int(UID), int(UID))
        settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)", DOCKERFILE, re.M))))
        settings |= {name: str(folder / "out" / "cache") for name in ("CACHE_ROOT", "MPLCONFIGDIR", "TORCH_HOME")}
        settings |= {"HOME": str(folder / "home"), "USER_ID": UID, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}

        def run(shared_memory: str, script: str, *arguments: object) -> subprocess.CompletedProcess:
            command = [sys.executable, script, *map(str, arguments)]
            inside = ["unshare", "-m", "bash", "-c", ENTER, "-", shared_memory, str(folder / "home"), *command]
            done = subprocess.run(
                inside, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=endings.SECONDS
            )
            if done.returncode == NO_CONTAINER or "unshare: " in done.stderr:
                pytest.skip(f"this system refuses it: {done.stderr.strip()}")
            if "Permission denied" in done.stderr and (sys.executable in done.stderr or str(ROOT) in done.stderr):
                pytest.skip(f"another user may not read this code or its Python: {done.stderr.strip()}")
            return done

        run.folder = folder
        yield run
    finally:
        shutil.rmtree(folder)


def training(folder: Path) -> list[object]:
    data = ["--trainset", "synthetic", "--train_data_path", folder / "data", "--test_data_path", folder / "data"]
    short = ["1" if word == "2" else word for word in SHORT]
    return [*data, *SMALL, *short, "--num_workers", "2", "--model_dir", folder / "out", "--experiment_name", "run"]


@pytest.mark.slow
def test_a_training_works_for_a_user_who_may_write_nothing_but_its_folder(container):
    done = container("64m", "train_slot.py", *training(container.folder), "--testset", "synthetic")
    assert done.returncode == 0, done.stderr
    made = container.folder / "out" / "run"
    assert (made / "best.pth").is_file() and (made / "results" / "synthetic" / "results.json").is_file()
    assert made.stat().st_uid == int(UID)


@pytest.mark.slow
def test_a_training_that_lacks_shared_memory_says_what_helps(container):
    done = container("256k", "train_slot.py", *training(container.folder))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(piece in last for piece in ("/dev/shm", "--shm-size", "--num_workers 0", "need")), last


def test_the_image_is_made_of_what_is_there_and_its_user_is_not_root():
    copied = re.findall(r"^COPY (?:--\S+ )*(\S+) ", DOCKERFILE, re.M)
    assert copied and all(glob.glob(pattern, root_dir=ROOT) for pattern in copied)
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.M) == ["user"] and int(UID) > 0
    run = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("# docker run"))
    assert "--shm-size" in shlex.split(run.removeprefix("# "))
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    listed = subprocess.run(["git", "ls-files", "checkpoints"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode or {*listed.stdout.split()} <= kept  # else the image would be a changed checkout
