"""Checkpoints on disk, the command line, provenance."""

import argparse

import pytest
import torch

import train_slot
import utils


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.pth"
    utils.save_checkpoint(path, {"model": {"w": torch.ones(2)}})
    with pytest.raises(RuntimeError), utils.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("the disk is full")
    assert torch.equal(utils.load_checkpoint(path)["model"]["w"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2]])
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(utils.UserError, match=r"a\.pth is not a checkpoint"):
        utils.load_checkpoint(tmp_path / "a.pth")


def test_a_path_without_checkpoint_is_answered_with_those_that_are_there(tmp_path):
    for name in ("a/best.pth", "a/latest.pth", "b/best.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        utils.save_checkpoint(tmp_path / name, {"model": {}})

    def said(name):
        with pytest.raises(utils.UserError, match="there is no checkpoint file") as stop:
            utils.load_checkpoint(tmp_path / name)
        return [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pth") if str(path) in str(stop.value)]

    assert sorted(said("c/best.pth")) == ["a/best.pth", "b/best.pth"]
    assert sorted(said("a/last.pth")) == ["a/best.pth", "a/latest.pth"]
    assert said("c/last.pth") == said("c/x**[.pth") == []
    assert sorted(said("a")) == ["a/best.pth", "a/latest.pth"]


@pytest.mark.parametrize("text", ["nan", "inf", "x", "", "-1", "3", "0.5.1"])
def test_junk_numbers_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        utils.number(float, above=0, high=2)(text)
    with pytest.raises(argparse.ArgumentTypeError):
        utils.number(int, low=4)(text)


def test_good_numbers_pass_with_their_bounds():
    assert utils.number(float, above=0, high=2)("2") == 2.0
    assert utils.number(int, low=0)("0") == 0


@pytest.mark.parametrize("text", ["True", "1", "yes", "", "flase"])
def test_booleans_are_true_or_false_and_nothing_else(text):
    assert utils.boolean("true") is True and utils.boolean("false") is False
    with pytest.raises(argparse.ArgumentTypeError):
        utils.boolean(text)


def test_a_bare_boolean_flag_means_true_and_its_default_stands_in_the_help(capsys):
    parser = utils.ArgumentParser(prog="x")
    utils.add_boolean(parser, "--report", help="write a page")
    utils.add_boolean(parser, "--keep", help="keep it", default=True)
    assert vars(parser.parse_args([])) == {"report": False, "keep": True}
    assert vars(parser.parse_args(["--report", "--keep", "false"])) == {"report": True, "keep": False}
    assert parser.parse_args(["--report", "true"]).report and not parser.parse_args(["--report=false"]).report
    with pytest.raises(SystemExit):
        parser.parse_args(["--report", "yes"])
    help_text = parser.format_help()
    assert "--report [true|false]" in help_text and help_text.count("default: true") == 1


@pytest.mark.parametrize(
    "given, meant",
    [
        (["--batchsize", "3"], "--batch_size?"),
        (["--batchsize=3"], "--batch_size?"),
        (["--clip", "5"], "--recipe clip=VALUE?"),
        (["--recipe", "small", "--clip", "5"], "--recipe clip=VALUE?"),
        (["--init_lr", "1e-4"], "--lr?"),
        (["--nothing_like_this", "1"], None),
        (["stray"], None),
    ],
)
def test_an_unknown_flag_is_answered_with_the_likely_one(given, meant, capsys):
    with pytest.raises(SystemExit):
        train_slot.parse_args(["--experiment_name", "x", *given])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and " ".join(given[-2:]) in said
    assert (f"did you mean {meant}" in said) if meant else ("did you mean" not in said)


@pytest.mark.parametrize("gpu", ["gpu", "-1", "1.5", ""])
def test_a_device_that_is_no_number_is_refused(gpu):
    with pytest.raises(utils.UserError, match="--gpu"):
        utils.pick_device(gpu)


def test_a_user_error_is_one_line_and_status_2_even_from_a_loader_process(capsys):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise utils.UserError("cannot decode the image x.jpg")

    with pytest.raises(SystemExit) as stop:
        utils.run_cli(lambda: list(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].endswith("error: cannot decode the image x.jpg")


def test_random_states_bring_the_same_numbers_back():
    utils.seed_everything(3)
    states = utils.random_states()
    first = torch.rand(4)
    utils.restore_random_states(states)
    assert torch.equal(first, torch.rand(4))
