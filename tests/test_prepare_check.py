"""The check of a set: one table of all that is wrong, and what is wrong in annotations."""

import pytest
from conftest import shared_folder

from dataset import TEST_SETS
from prepare.check import annotation_problems


def test_the_check_prints_one_table_of_all_that_is_wrong(damaged, cli):
    flags = ("--test_data_path", damaged, "--test_gt_path", damaged / "boxes.json", "--workers", 0)
    done = cli("prepare_data", "check", "--testset", "custom", *flags)
    assert done.returncode == 1 and "not complete" in done.stdout, done.stderr
    counts = {
        "expected": 7, "present": 6, "missing": 1, "decodable": 4, "not decodable": 2, "silent (digital zero)": 1,
        "shorter than 5 s": 1, "same content as another": 2, "boxes outside the image": 1,
        "boxes beyond a million": 1, "boxes without area": 1,
    }  # fmt: skip
    for what, count in counts.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{what} ")]
        assert int(line[len(what) :].split()[0]) == count, what
    assert "b.png" in done.stdout and "c.wav" in done.stdout
    of_training = ("--train_data_path", damaged, "--metadata", damaged, "--workers", 0)
    done = cli("prepare_data", "check", "--trainset", "custom", *of_training)
    assert done.returncode == 1 and "not decodable" in done.stdout
    (damaged / "boxes.json").write_text('[{"file": "a", "class": "x", "bbox": [[0, 0, NaN, 1]]}]')
    done = cli("prepare_data", "check", "--testset", "custom", *flags)
    assert done.returncode == 2 and "1 boxes not a number" in done.stdout and "boxes.json" in done.stderr
    for wrong in ([], ["--trainset", "custom", "--testset", "custom"], ["--testset", "x"]):
        assert cli("prepare_data", "check", *wrong).returncode == 2


@pytest.mark.slow
def test_the_boxes_of_vggss_have_their_known_problems():
    folder = shared_folder("metadata")
    problems = annotation_problems(TEST_SETS["vggss"], folder / "vggss.json")
    assert problems["beyond a million"] == 12 and problems["without area"] == 18
