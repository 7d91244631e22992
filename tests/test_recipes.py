"""Recipes: the defaults of every training, however it is started, and what overrides them."""

import sys

import pytest
from torch.distributed.run import get_args_parser

import recipes
import train_slot
from recipes import DATA, LOSSES, OPTIMISATION, RUN, TESTS, modern, roles
from utils import UserError


def settings(*flags):
    return vars(train_slot.parse_args(["--experiment_name", "x", *flags]))


@pytest.mark.parametrize(
    "trainset, epochs, sharpening, arch",
    [
        ("vggss_10k", 100, 0.1, "resnet18"), ("vggss_144k", 50, 1.0, "resnet18"), ("vggss_heard", 50, 1.0, "resnet18"),
        ("flickr_144k", 50, 1.0, "resnet18"), ("custom", 100, 0.1, "resnet18"), ("synthetic", 10, 0.02, "small"),
    ],
)  # fmt: skip
def test_the_training_set_chooses_the_recipe(trainset, epochs, sharpening, arch):
    found = settings("--trainset", trainset)
    assert (found["epochs"], found["infer_sharpening"], found["image_encoder"]) == (epochs, sharpening, arch)


def test_one_word_gives_any_set_the_small_recipe_with_either_objective():
    built_in, own = settings("--trainset", "synthetic"), settings("--trainset", "custom", "--recipe", "small")
    assert {key for key in own if own[key] != built_in[key]} == {"trainset"}
    listen = settings("--trainset", "custom", "--recipe", "small", "--objective", "listen")
    assert listen["image_encoder"] == "small" and listen["weights"]["share_contrast"] == 1
    assert (listen["infer_sharpening"], listen["infer_smoothing"]) == (0.1, 0.1)


def test_the_recipe_frozen_has_settings_for_each_objective_and_its_tested_size_is_of_its_own_encoder():
    pytest.importorskip("timm")
    frozen = "--trainset", "custom", "--recipe", "frozen", "--objective"
    own, listen = settings(*frozen, "paper"), settings(*frozen, "listen")
    assert own["freeze_image"] and own["image_encoder"] == "timm:tf_efficientnet_lite0" and own["image_size"] == 224
    assert own["audio_encoder"] == "small" and own["cached_views"] == recipes.CACHED_VIEWS
    assert own["infer_image_size"] == listen["infer_image_size"] == 384
    assert (listen["infer_sharpening"], listen["infer_smoothing"]) == (0.05, 0.15)
    assert settings("--objective", "listen")["infer_sharpening"] == 0.1  # of other recipes
    other = settings("--recipe", "frozen", "--image_encoder", "timm:vit_small_patch14_dinov2")
    assert other["infer_image_size"] is None and other["image_size"] == 518
    assert settings("--trainset", "photographs")["recipe"] == "frozen"


def test_a_flag_beats_the_recipe_and_so_does_a_setting_after_its_name():
    found = settings("--recipe", "small", "clip=1", "dim=32", "--epochs", "3", "--recipe", "warmup=2")
    assert (found["clip"], found["dim"], found["epochs"], found["warmup"]) == (1, 32, 3, 2)
    assert found["recipe"] == "small" and found["lr"] == 1e-3
    assert settings("--objective", "listen", "--recipe", "infer_smoothing=0")["infer_smoothing"] == 0


def test_weights_have_the_names_of_the_losses_and_of_the_paper():
    plain = recipes.PAPER_WEIGHTS
    assert settings()["weights"] == plain
    for flags in (["--lam3", "7"], ["--weights", "lam3=7"], ["--weights", "attention_matching=7"], ["--lam3=7"]):
        assert settings(*flags)["weights"] == plain | {"attention_matching": 7}
    found = settings("--objective", "listen", "--weights", "silence=1", "foreign_claims=0", "--lam1", "0.2")["weights"]
    assert found == plain | {"reconstruction": 0.2, "attention_matching": 0, "share_contrast": 1, "silence": 1}


@pytest.mark.parametrize("words", [["luck"], ["luck=1"], ["epochs=3"], ["clip=-1"]])
def test_a_recipe_or_setting_that_there_is_not_is_refused(words):
    with pytest.raises(UserError, match=words[0]):
        settings("--recipe", *words)


def test_the_group_of_a_flag_says_what_it_may_change():
    found = roles()
    assert found.keys() == settings().keys()
    expected = {"lr": OPTIMISATION, "weights": LOSSES, "train_list": DATA, "testset": TESTS, "infer_sharpening": TESTS}
    expected |= dict.fromkeys(("keep_every", "save_every_steps", "resume", "gpu", "allow_missing", "recipe"), RUN)
    assert {name: found[name] for name in expected} == expected


def test_there_are_at_most_54_flags(capsys):
    with pytest.raises(SystemExit):
        train_slot.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 40 < sum(line.startswith("  --") for line in lines) <= 54


def test_settings_of_older_runs_have_todays_names():
    old = {"lam1": 0.1, "lam2": 0.1, "lam3": 0.0, "share_contrast": 1.0, "foreign_claims": 4.0, "silence": 0.0}
    found = modern(old | {"map_contrast": 0.0, "foreign_tokens": 2.0, "objective": "joint_slot", "tau": 0.05})
    assert found["objective"] == "paper" and found["tau"] == 0.05 and found["foreign_tokens"] == 2.0
    assert found["weights"] == settings("--objective", "listen")["weights"] and "map_contrast" not in found
    assert modern(old | {"objective": "maxpool_contrastive"})["objective"] == "maxpool"
    assert modern(found) == found


def test_torchrun_starts_with_the_same_recipe(monkeypatch):
    command = "--nproc_per_node 4 train_slot.py --trainset vggss_144k --experiment_name x --batch_size 1024"
    launched = get_args_parser().parse_args(command.split())
    monkeypatch.setattr(sys, "argv", [launched.training_script, *launched.training_script_args])
    args = train_slot.parse_args()
    assert (args.epochs, args.infer_sharpening, args.batch_size) == (50, 1.0, 1024)


def test_max_pooling_has_one_loss():
    assert settings("--objective", "maxpool")["weights"] == {"info_nce": 1.0}
    old = {"lam1": 0.1, "lam2": 0.1, "lam3": 100.0, "objective": "maxpool_contrastive"}
    assert modern(old)["weights"] == {"info_nce": 1.0}


def test_two_recipes_at_once_are_refused():
    with pytest.raises(UserError, match="small and paper"):
        settings("--recipe", "small", "--recipe", "paper")
