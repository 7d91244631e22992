"""A run that fails ends within seconds, with a status that is not 0 and one line that says what helps."""

import multiprocessing.resource_sharer
import os
import shutil
import subprocess
import sys

import endings
import numpy as np
import pytest
import soundfile
from conftest import ROOT

import utils
from distributed import OTHER_FAILED


def run(*words, **settings):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=endings.SECONDS, **settings)


def test_an_error_while_workers_load_ends_the_run(tmp_path):
    done = run(ROOT / "tests" / "endings.py", tmp_path)
    assert done.returncode == 0, done.stderr
    for case, pieces in endings.MESSAGES.items():
        told = (tmp_path / case).read_text()
        assert (tmp_path / f"{case}.status").read_text() == "2" and told.count("endings.py: error: ") == 1, told
        assert all(piece in told for piece in pieces) and "Traceback" not in told, told  # workers speak in between


@pytest.mark.slow
def test_a_process_of_several_that_fails_or_is_killed_ends_all_and_torchrun_restarts_them():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max-restarts", 1]
    done = run(*torchrun, ROOT / "tests" / "endings.py")
    assert done.returncode == 1
    assert "error: this is the first cause" in done.stderr and "started again" in done.stdout, done.stderr
    assert done.stderr.count(f"error: {OTHER_FAILED}") == 2 and "AssertionError" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or os.getuid(), reason="needs root and unshare for a small /dev/shm")
def test_a_container_with_little_shared_memory_is_told_so(checkpoint, synthetic_root, tmp_path):
    flags = ["--testset", "synthetic", "--test_data_path", synthetic_root, "--gpu", "cpu", "--imagenet_weights", "none"]
    flags += ["--checkpoint", checkpoint, "--out_dir", tmp_path, "--num_workers", "2"]
    mount = 'mount -t tmpfs -o size=64k none /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "-m", "bash", "-c", mount, "-", sys.executable, "test_model.py", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=endings.SECONDS)
    if done.returncode == 77 or "unshare: " in done.stderr:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert all(piece in last for piece in ("/dev/shm", "--shm-size", "--num_workers 0")), last


@pytest.mark.parametrize("text, shown", [("DataLoader worker (pid 7) is killed by signal: Killed. ", 0), ("else", 1)])
def test_the_end_of_a_worker_is_not_told_from_a_destructor_as_well(text, shown, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""import utils
class Connection:
    def __del__(self):
        raise RuntimeError({text!r})
utils.run_cli(Connection)
"""
    )
    done = run(script, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr.count("Traceback") == shown, done.stderr


@pytest.mark.parametrize(
    "error, pieces",
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), ["memory"]),
        (MemoryError("Unable to allocate 9 GiB"), ["Unable to allocate 9 GiB", "--batch_size"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), ["/dev/shm"]),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), ["exited unexpectedly"]),
        (OSError(24, "Too many open files"), ["ulimit"]),
        (OSError(12, "Cannot allocate memory"), ["--batch_size"]),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_what_a_machine_lacks_is_told_from_an_error_of_the_code(error, pieces):
    told = utils.what_ran_out(error)
    assert told is None if pieces is None else all(piece in told for piece in pieces), told
    assert told is None or "\n" not in told


def test_a_batch_whose_worker_is_gone_is_told_as_a_lost_worker(tmp_path, capsys):
    address = str(tmp_path / "socket"), 1
    with pytest.raises(SystemExit, match="2"):
        utils.run_cli(lambda: multiprocessing.resource_sharer._resource_sharer.get_connection(address))
    told = capsys.readouterr().err
    assert "a data-loading worker ended" in told and "--num_workers 0" in told


NOWHERE_TO_WRITE = """
import sys
import localize, test_model, train_slot
from audio_io import log_spectrogram, load_audio
from reports.curves import plot_curves
assert log_spectrogram(load_audio(sys.argv[1])).isfinite().all()
plot_curves([{"epoch": 1, "loss": 1.0}], sys.argv[2])
print(*sorted({"librosa", "numba"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_no_hindrance(tmp_path):
    """As in a container that runs as another user: whoever keeps compiled code in a home fails there."""
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(44100)), 44100)
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), "/dev/null/none")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "NUMBA"))}
    files = tmp_path / "a.wav", tmp_path / "curves.png"
    done = run("-c", NOWHERE_TO_WRITE, *files, env=kept | nowhere | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"{done.stdout} is imported, which compiles into a cache"
    assert files[1].stat().st_size > 0
