"""The settings of a training: their flags, by group, and their values, by recipe and objective.

The training set chooses the recipe, or --recipe does. Its values are the defaults of train_slot.py's flags,
however that is started: a flag beats the recipe, and so does NAME=VALUE after --recipe, for settings without a flag.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from dataset import TRAIN_SETS
from models import OLD_OBJECTIVES, with_encoders
from resnet import ARCHITECTURES, TIMM, configured_size, own_audio_encoder
from sets import add_run_data_flags, add_test_set_flags
from utils import ArgumentParser, UserError, add_boolean, add_workers, as_user_error, number

PAPER = {  # Kim et al., CVPR 2025, sections 3 and 4, for the sets of 10k pairs
    "image_encoder": "resnet18",
    "audio_encoder": None,  # that of the images
    "dim": None,  # of the encoder
    "image_weights": "auto",
    "freeze_image": False,
    "cached_views": None,  # CACHED_VIEWS with freeze_image
    "unfreeze_last": 0,
    "unfrozen_lr": 0.1,  # rate of unfrozen stages, as a share of --lr
    "cache_by": "date",  # what tells image files apart: path, size and time of change, or contents
    "frozen_weights": "stored",  # in checkpoints: or by reference to their file
    "image_size": 224,
    "audio_seconds": 5.0,
    "num_slots": 2,
    "iterations": 5,
    "augment": "hard",
    "tau": 0.03,
    "mask_ratio": 0.1,
    "reciprocal_k": None,  # 20 per 256 pairs
    "warmup": 0,  # first epochs with the contrastive loss only
    "epochs": 100,
    "batch_size": 256,
    "lr": 5e-5,
    "weight_decay": 0.01,
    "lr_schedule": "constant",
    "lr_warmup": 0.0,  # share of all steps until --lr is reached
    "clip": 0.0,  # largest gradient norm; 0: no clipping
    "eval_every": 1,
    "decode_once": "false",
    "infer_image_size": None,  # that of training
    "infer_sharpening": 0.1,
    "infer_smoothing": 0.0,
}
CACHED_VIEWS = 4
SMALL = PAPER | {  # minutes on a CPU
    "image_encoder": "small",
    "image_weights": "none",
    "image_size": 112,
    "audio_seconds": 1.6,
    "iterations": 3,
    "augment": "plain",
    "tau": 0.05,
    "reciprocal_k": 0,
    "epochs": 10,
    "batch_size": 64,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "lr_warmup": 0.06,
    "clip": 5.0,
    "eval_every": 0,
    "decode_once": "auto",
    "infer_sharpening": 0.02,
}
FROZEN = SMALL | {  # learns from photographs in minutes on a CPU: its image encoder has seen ImageNet
    "image_encoder": "timm:tf_efficientnet_lite0",
    "audio_encoder": "small",
    "dim": 144,
    "image_weights": "auto",
    "freeze_image": True,
    "infer_image_size": 384,  # this and the settings of each objective: chosen on photographs_val
    "epochs": 22,
}
FROZEN_OBJECTIVES = {  # objective: settings that differ from those of the recipe frozen and of OBJECTIVES
    "listen": {"infer_sharpening": 0.05, "infer_smoothing": 0.15},
}
RECIPES = {
    "paper": PAPER,
    "paper_144k": PAPER | {"epochs": 50, "infer_sharpening": 1.0},
    "small": SMALL,
    "frozen": FROZEN,
}
RECIPE_OF = {  # training sets with another recipe than `paper`
    "vggss_144k": "paper_144k",
    "vggss_heard": "paper_144k",
    "flickr_144k": "paper_144k",
    "synthetic": "small",
    "photographs": "frozen",
}


def one_of(*words: str) -> Callable[[str], str]:
    """An argparse type: one of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r}: choose {' or '.join(words)}")
        return text

    return parse


WITHOUT_FLAG = {  # settings that NAME=VALUE after --recipe changes
    "dim": number(int, low=2),
    "unfrozen_lr": number(float, above=0),
    "cache_by": one_of("date", "contents"),
    "frozen_weights": one_of("stored", "reference"),
    "weight_decay": number(float, low=0),
    "clip": number(float, low=0),
    "lr_warmup": number(float, low=0, high=1),
    "warmup": number(int, low=0),
    "infer_sharpening": number(float, above=0),
    "infer_smoothing": number(float, low=0, high=1 / 3),
}
INFERENCE = {"infer_image_size", "infer_sharpening", "infer_smoothing"}  # how maps are computed in tests

PAPER_WEIGHTS = {"info_nce": 1.0, "reconstruction": 0.1, "slot_divergence": 0.1, "attention_matching": 100.0}
MAXPOOL_WEIGHTS = {"info_nce": 1.0}
PAPER_NAMES = {"lam1": "reconstruction", "lam2": "slot_divergence", "lam3": "attention_matching"}
OUR_LOSSES = ("share_contrast", "foreign_claims", "silence")  # not in the paper
GONE_LOSSES = ("map_contrast", "foreign_tokens")  # older runs may have them; see docs/listening.md
OBJECTIVES = {  # objective: (weights of losses, settings) that differ from the paper's and the recipe's
    "paper": ({}, {}),
    "listen": (
        {"share_contrast": 1.0, "foreign_claims": 4.0, "attention_matching": 0.0},
        {"infer_sharpening": 0.1, "infer_smoothing": 0.1},
    ),
    "maxpool": ({}, {}),
}

DATA, TESTS, MODEL, LOSSES, OPTIMISATION, RUN = (
    "training data", "test data", "model", "losses", "optimisation", "run",
)  # fmt: skip


# ---------------------------------------------------------------- flags


class _Weight(argparse.Action):
    """Adds (loss, weight) of `--lam3 0` or of `--weights lam3=0 silence=1` to those given before."""

    def __call__(self, parser, args, values, option=None) -> None:
        given = values if isinstance(values, list) else [(option.lstrip("-"), values)]
        setattr(args, self.dest, [*(getattr(args, self.dest) or ()), *given])


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    known = [*PAPER_NAMES, *PAPER_NAMES.values(), *OUR_LOSSES]
    if name not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=W with NAME of {', '.join(known)}")
    return name, number(float, low=0)(value)


def _data_flags(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Which pairs are learnt from, which are held out."""
    group = parser.add_argument_group(DATA)
    group.add_argument(
        "--trainset", choices=sorted(TRAIN_SETS), default="synthetic", help="training set; custom: your own pairs"
    )
    group.add_argument("--train_list", help="file of training ids, one per line, in place of the set's own list")
    held_out = "file of ids held out to choose best.pth by retrieval (default: the set's own list, else a fraction)"
    group.add_argument("--val_list", help=held_out)
    group.add_argument(
        "--val_fraction", type=number(float, low=0, high=0.5), default=0.02,
        help="fraction of training pairs held out to choose best.pth, where no list says which",
    )  # fmt: skip
    add_boolean(group, "--exclude_test_overlap", "do not train on ids that are in a test list in --metadata")
    return group


def add_infer_image_size(group, default: str) -> None:
    group.add_argument(
        "--infer_image_size", type=number(int, low=16), metavar="PX",
        help=f"side of the images in tests, in pixels: larger ones give finer maps (default: {default})",
    )  # fmt: skip


def _test_flags(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """What is scored while training."""
    group = parser.add_argument_group(TESTS)
    add_test_set_flags(group, default=None)
    add_infer_image_size(group, "that of training, unless the recipe says otherwise")
    group.add_argument(
        "--eval_every", type=number(int, low=0), help="epochs between two scorings of --testset; 0: only at the end"
    )
    return group


def _model_flags(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Objective, encoders, slots and the size of the input."""
    group = parser.add_argument_group(MODEL)
    group.add_argument(
        "--objective", choices=[*OBJECTIVES], default="paper",
        help="paper: joint slot attention; listen: the same with share contrast and foreign claims in place of "
        "attention matching, so that maps follow the audio; maxpool: max-pooled contrast on the same encoders, without "
        "slots (EZ-VSL's objective)",
    )  # fmt: skip
    group.add_argument(
        "--image_encoder", "--arch", type=_encoder, metavar="NAME",
        help="image encoder: resnet18 (the paper's), small (for CPUs), or timm:NAME, any network of timm; "
        "timm:NAME@STAGE takes another of its feature stages than the last, counted from 0",
    )  # fmt: skip
    group.add_argument(
        "--audio_encoder", type=_encoder, metavar="NAME",
        help="audio encoder, by the same names (default: as --image_encoder; resnet18 beside one of timm)",
    )  # fmt: skip
    group.add_argument("--num_slots", type=number(int, low=1), help="number of slots; slot 0 is the target slot")
    group.add_argument("--iterations", type=number(int, low=1), help="iterations of slot attention")
    group.add_argument(
        "--image_size", type=number(int, low=16),
        help="side of the square input image, in pixels (of networks of timm, the default is what they were made for)",
    )  # fmt: skip
    group.add_argument("--audio_seconds", type=number(float, low=0.1), help="length of the input audio, in seconds")
    group.add_argument(
        "--image_weights", "--imagenet_weights", metavar="auto|none|FILE",
        help="initial weights of the image encoder: auto (download), none (random), or a file (pth, safetensors)",
    )  # fmt: skip
    add_boolean(
        group, "--freeze_image", "keep the image encoder's weights, but for its last projection, as they are; its "
        "features are computed once and kept in CACHE_ROOT (default: cache/)",
    )  # fmt: skip
    group.add_argument(
        "--cached_views", type=number(int, low=0), metavar="N",
        help="with --freeze_image: kept views of each image, the whole one and N - 1 augmented ones; 0: keep none, "
        f"augment in every epoch (default: {CACHED_VIEWS})",
    )  # fmt: skip
    group.add_argument(
        "--unfreeze_last", type=number(int, low=0), metavar="N",
        help="with --freeze_image: train the last N stages of the encoder, too, at a rate of their own (see --recipe); "
        "no features are kept then",
    )  # fmt: skip
    return group


def _loss_flags(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Temperature, masks, false negatives, weights."""
    group = parser.add_argument_group(LOSSES)
    group.add_argument("--tau", type=number(float, above=0), help="temperature of the contrastive loss")
    group.add_argument(
        "--mask_ratio", type=number(float, low=0, high=0.99), help="fraction of tokens hidden in training"
    )
    group.add_argument(
        "--reciprocal_k", type=number(int, low=0),
        help="k of the k-reciprocal false-negative rule (default: 20 at batch 256, scaled with the batch; 0 = off)",
    )  # fmt: skip
    group.add_argument(
        "--weights", type=_weight, nargs="+", action=_Weight, metavar="NAME=W",
        help=f"weights of losses: {', '.join(f'{name} ({paper})' for paper, name in PAPER_NAMES.items())}; not in the "
        f"paper: {', '.join(OUR_LOSSES)} (default: the paper's 0.1, 0.1, 100, or those of --objective)",
    )  # fmt: skip
    group.add_argument(
        "--lam1", "--lam2", "--lam3", type=number(float, low=0), dest="weights", action=_Weight, metavar="W",
        help="the paper's weights one by one: --lam3 0 is --weights lam3=0",
    )  # fmt: skip
    return group


def _optimisation_flags(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Augmentation, batch, learning rate, precision, seed."""
    group = parser.add_argument_group(OPTIMISATION)
    group.add_argument(
        "--augment", choices=("hard", "plain"), help="hard: the paper's augmentation; plain: crop and flip only"
    )
    group.add_argument("--epochs", type=number(int, low=1), help="passes over the training pairs")
    group.add_argument("--batch_size", type=number(int, low=2), help="pairs per step, over all processes together")
    group.add_argument(
        "--micro_batch", type=number(int, low=1),
        help="pairs per process that go through the network at once, to save memory; the losses still see the whole "
        "batch",
    )  # fmt: skip
    add_boolean(group, "--sync_bn", "compute batch-norm statistics over all processes (CUDA only)")
    group.add_argument("--lr", type=number(float, above=0), help="learning rate of AdamW")
    group.add_argument(
        "--lr_schedule", choices=("constant", "step", "cosine"),
        help="learning rate after the warm-up; step: x 0.9 per epoch; cosine: falls to 0 at the end",
    )  # fmt: skip
    group.add_argument(
        "--amp", choices=("auto", "bf16", "fp16", "none"), default="auto",
        help="precision of the encoders; auto: bf16 where the hardware makes it faster (the small one on a CPU needs "
        "AMX), else fp16 on CUDA, fp32 on CPUs",
    )  # fmt: skip
    add_boolean(
        group, "--compile", "compile the model (torch.compile), on CUDA its slots and losses: the first step takes "
        "minutes, the others may become faster; numbers differ by rounding",
    )  # fmt: skip
    group.add_argument(
        "--select", choices=("retrieval", "test"), default="retrieval",
        help="what best.pth is chosen by: retrieval on held-out pairs (no boxes), or cIoU on the first --testset",
    )  # fmt: skip
    group.add_argument(
        "--seed",
        type=number(int, low=0, high=2**32 - 1),
        default=0,
        help="random seed; on a CPU the same one gives the same numbers",
    )
    return group


def _run_flags(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Where data and results lie; nothing here changes what is learnt."""
    group = parser.add_argument_group(RUN)
    where = (
        "root of the training data, or shards: a folder, a pattern or a list (default: the set's environment variable)"
    )
    group.add_argument("--train_data_path", help=where)
    add_run_data_flags(group)
    add_workers(group)
    group.add_argument(
        "--decode_once", choices=("auto", "memory", "disk", "false"),
        help="keep what images and audio files hold for the later epochs: in memory, or in a file in CACHE_ROOT "
        "(default: cache/); auto: in memory if all pairs fit; changes no number",
    )  # fmt: skip
    group.add_argument(
        "--gpu", default="0", help="number of a CUDA device, or cpu; torchrun gives every process its own"
    )
    group.add_argument(
        "--model_dir", default="./checkpoints", help="folder in which every run gets a folder of its own"
    )
    group.add_argument("--experiment_name", required=True, help="name of this run, and of its folder in --model_dir")
    group.add_argument(
        "--wandb", choices=("true", "offline", "false"), default="false",
        help="log to Weights & Biases; offline: record locally, for wandb sync",
    )  # fmt: skip
    group.add_argument(
        "--resume", nargs="?", const="true", choices=("true", "false", "force"), default="false",
        help="continue from latest.pth; force: even if settings or data differ, then from the start of the epoch",
    )  # fmt: skip
    group.add_argument(
        "--save_every_steps", type=number(int, low=0), default=0, metavar="N",
        help="also write latest.pth every N steps; 0: only at the end of an epoch",
    )  # fmt: skip
    group.add_argument(
        "--keep_every", type=number(int, low=0), default=0, metavar="K",
        help="keep a checkpoint epoch_NNNN.pth every K epochs; 0: none",
    )  # fmt: skip
    add_boolean(group, "--overwrite", "replace an existing run of the same name")
    add_boolean(group, "--dry_run", "try one training step and one batch of every test set, then stop; writes nothing")
    return group


def _encoder(text: str) -> str:
    if text not in ARCHITECTURES and (not text.startswith(TIMM) or text == TIMM):
        raise argparse.ArgumentTypeError(f"{text!r}: choose {', '.join(ARCHITECTURES)} or {TIMM}NAME")
    return text


def add_flags(parser: ArgumentParser) -> dict[str, str]:
    """Every flag of a training -> {flag: its group}. The group says what the flag may change.

    Only flags of the groups "training data", "model", "losses" and "optimisation" change what is learnt; those of "test
    data" matter too where --select test lets tests choose the checkpoint.
    """
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe", nargs="+", action="extend", metavar=("NAME", "SETTING=VALUE"),
        help=f"recipe, which sets the defaults of the flags below: {', '.join(RECIPES)} (default: chosen by "
        f"--trainset); SETTING=VALUE changes a setting that has no flag: {', '.join(WITHOUT_FLAG)}",
    )  # fmt: skip
    groups = [
        add(parser) for add in (_data_flags, _test_flags, _model_flags, _loss_flags, _optimisation_flags, _run_flags)
    ]
    return {action.dest: group.title for group in groups for action in group._group_actions}


@cache
def roles() -> dict[str, str]:
    """{setting: group of its flag}; those without a flag count as "optimisation", those of inference as "test data"."""
    found = add_flags(ArgumentParser())
    storage = dict.fromkeys(("cache_by", "frozen_weights", "recipe"), RUN)
    return dict.fromkeys(WITHOUT_FLAG, OPTIMISATION) | dict.fromkeys(INFERENCE, TESTS) | found | storage


# ---------------------------------------------------------------- values


def parse(parser: ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of `add_flags`, with the values of the recipe and of the objective where a flag is not given.

    Settings without a flag are included; `recipe` is the recipe's name, `weights` is {loss: weight} of all losses that
    are computed. UserError for an unknown recipe or setting.
    """
    first = ArgumentParser(prog=parser.prog, add_help=False)
    first.add_argument("--trainset", default="synthetic")
    first.add_argument("--recipe", nargs="+", action="extend", default=[])
    first.add_argument("--objective", default="paper")
    first.add_argument("--image_encoder", "--arch")
    early, _ = first.parse_known_args(argv)
    name, own = read_recipe(early.recipe, RECIPE_OF.get(early.trainset, "paper"))
    weights, settings = OBJECTIVES.get(early.objective, ({}, {}))
    settings = RECIPES[name] | settings | (FROZEN_OBJECTIVES.get(early.objective, {}) if name == "frozen" else {}) | own
    if early.image_encoder not in (None, settings["image_encoder"]):
        settings["infer_image_size"] = None  # the recipe's is of its own encoder
    if (early.image_encoder or settings["image_encoder"]).startswith(TIMM):
        settings["image_size"] = None  # of the network's configuration
    parser.set_defaults(**{key: value for key, value in settings.items() if key not in WITHOUT_FLAG})
    parser.instead = {f"--{key}": f"--recipe {key}=VALUE" for key in WITHOUT_FLAG} | {"--init_lr": "--lr"}
    args = parser.parse_args(argv)
    vars(args).update({key: settings[key] for key in WITHOUT_FLAG}, recipe=name)
    if args.cached_views is not None and not args.freeze_image:
        raise UserError("--cached_views: without --freeze_image no features are kept")
    if args.cached_views and args.unfreeze_last:
        raise UserError("--cached_views: with --unfreeze_last no features are kept, as they change")
    if args.cached_views is None:
        args.cached_views = CACHED_VIEWS if args.freeze_image else 0
    if not args.unfreeze_last:
        args.unfrozen_lr = 0.0
    args.audio_encoder = args.audio_encoder or own_audio_encoder(args.image_encoder)
    if args.image_size is None:
        with as_user_error(ValueError):
            args.image_size = configured_size(args.image_encoder)
    given = {PAPER_NAMES.get(loss, loss): weight for loss, weight in args.weights or ()}
    own = MAXPOOL_WEIGHTS if args.objective == "maxpool" else PAPER_WEIGHTS
    weights = own | weights | given
    args.weights = {loss: weight for loss, weight in weights.items() if weight or loss in own}
    return args


def read_recipe(words: Iterable[str], name: str) -> tuple[str, dict[str, Any]]:
    """Words after --recipe -> the recipe's name (`name` where they give none), and {setting: value} of NAME=VALUE."""
    own, names = {}, []
    for word in words:
        setting, is_setting, value = word.partition("=")
        if not is_setting:
            if names and word != names[0]:
                raise UserError(f"--recipe {names[0]} and {word}: one of them")
            names.append(word)
            continue
        if setting not in WITHOUT_FLAG:
            flag = f": it has a flag of its own, --{setting} {value}" if setting in PAPER else ""
            raise UserError(f"--recipe {word}: the settings to give here are {', '.join(WITHOUT_FLAG)}{flag}")
        try:
            own[setting] = WITHOUT_FLAG[setting](value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--recipe {word}: {error}") from error
    name = names[0] if names else name
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: choose from {', '.join(RECIPES)}")
    return name, own


def renamed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, of which older code had one for both encoders and another name for the weights."""
    found = with_encoders(flags)
    if "imagenet_weights" in found:
        found["image_weights"] = found.pop("imagenet_weights")
    return found


def modern(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run under today's names: older code had a flag for each weight, and other names of objectives.

    What is switched off of a loss that is gone is left out. `objective` names the model, "paper" or "maxpool": what
    `listen` changes, the weights say.
    """
    objective = flags.get("objective", "paper")
    found = renamed(flags)
    found["objective"] = {"listen": "paper"}.get(objective, OLD_OBJECTIVES.get(objective, objective))
    if "weights" in flags or not PAPER_NAMES.keys() & flags.keys():
        return found
    weights = {"info_nce": 1.0} | {loss: flags[name] for name, loss in PAPER_NAMES.items() if name in flags}
    weights |= {loss: flags[loss] for loss in OUR_LOSSES if flags.get(loss)}
    found["weights"] = MAXPOOL_WEIGHTS if found["objective"] == "maxpool" else weights
    gone = {*PAPER_NAMES, *OUR_LOSSES, "alpha", "force", *(loss for loss in GONE_LOSSES if not flags.get(loss))}
    return {name: value for name, value in found.items() if name not in gone}
