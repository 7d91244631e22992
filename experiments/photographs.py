"""Photographic scenes: cut-outs with their sounds on photographs, and what the objectives learn from them.

    python -m experiments.photographs make --cutouts experiments/tuxpaint.csv --photos PHOTOS... --out data/photographs
    python -m experiments.photographs digits --photos PHOTOS... --out data/digits
    python -m experiments.photographs table --seeds 0 1 2 --image_weights FILE            # trains what is missing
    python -m experiments.photographs table --seeds 0 1 2 --image_weights FILE --write_docs

`make` takes a folder of kinds, or a list of them; `digits` enlarges scikit-learn's handwritten digits and lets
espeak-ng say them. `table` trains every row with every seed, one after the other; a finished training is kept, an
interrupted one continues. Its checkpoints are ordinary ones, in a folder for each row and seed.
"""

import shutil
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import soundfile
from tqdm import tqdm

from experiments.pasted import COUNTS, Material, make_set, read_kinds, split_photos
from experiments.runs import PYTHON, Row, Training, call, train_all
from experiments.tables import (
    CLASS_RECALL,
    figure,
    markdown,
    mean_and_worst,
    provenance_line,
    read_results,
    write_tables,
)
from scoring.bootstrap import bootstrap, interval
from scoring.compare import Configuration, read_run, seed_means
from utils import ArgumentParser, UserError, add_boolean, number, run_cli

ONE, DISTRACTOR, INTERACTIVE, OFFSCREEN, UNSEEN, UNSEEN_DISTRACTOR = SPLITS = (
    "photographs", "photographs_distractor", "photographs_interactive", "photographs_offscreen", "photographs_unseen",
    "photographs_unseen_distractor",
)  # fmt: skip
FROZEN = "--recipe frozen --image_weights {weights}"
ROWS = {  # epochs were chosen on photographs_val, which has photographs of its own
    "published": Row("published", f"{FROZEN} --epochs 8"),
    "maxpool": Row("max-pool contrast", f"{FROZEN} --objective maxpool"),
    "listen": Row("listen", f"{FROZEN} --objective listen"),
    "listen_silence": Row("listen + silence", f"{FROZEN} --objective listen --weights silence=1"),
    "small_published": Row("published, small from random weights", "--recipe small"),
    "small_maxpool": Row("max-pool contrast, small from random weights", "--recipe small --objective maxpool"),
    "small_listen": Row("listen, small from random weights", "--recipe small --objective listen"),
}
OTHER_SIZE = 224  # px, that of training: models with frozen encoders are tested at it as well
COLUMNS = (  # head, split, map, metric
    ("one object: cIoU", ONE, "AUD", "cIoU"),
    ("class R@1", ONE, "AUD", CLASS_RECALL),
    ("distractor: pointing", DISTRACTOR, "AUD", "pointing"),
    ("(wrong sound)", DISTRACTOR, "AUD_wrong", "pointing"),
    ("cIoU", DISTRACTOR, "AUD", "cIoU"),
    ("listening", DISTRACTOR, "AUD", "listening"),
    ("interactive: both_pointing", INTERACTIVE, "AUD", "both_pointing"),
    ("IIoU", INTERACTIVE, "AUD", "IIoU"),
    ("off-screen: presence_AP", OFFSCREEN, "AUD", "presence_AP"),
    ("by the map", OFFSCREEN, "AUD", "presence_AP@presence"),
    ("unseen cut-outs: pointing", UNSEEN_DISTRACTOR, "AUD", "pointing"),
    ("cIoU", UNSEEN_DISTRACTOR, "AUD", "cIoU"),
)
COMPARED = (DISTRACTOR, ("pointing", "cIoU")), (INTERACTIVE, ("IIoU",)), (UNSEEN_DISTRACTOR, ("pointing", "cIoU"))
PAGE = Path("docs/listening.md")


# ---------------------------------------------------------------- digits

DIGIT_SIDE = 96  # pixels of an enlarged digit, of 8 x 8
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan")
VARIANTS = ("", "+f2", "+f4", "+m3", "+m7", "+croak", "+whisper", "+klatt2")
SPEEDS = (120, 150, 185)  # words a minute


def make_digits(folder: Path, each: int = 60) -> None:
    """Write a folder of kinds: handwritten digits as cut-outs, coloured, and espeak-ng's voices that say them."""
    from sklearn.datasets import load_digits

    if shutil.which("espeak-ng") is None:
        raise UserError("digits are spoken by espeak-ng, which is not installed: apt install espeak-ng")
    data, rng = load_digits(), np.random.default_rng(0)
    for digit, word in enumerate(tqdm(DIGITS, "digits", disable=None)):
        kind = folder / word
        kind.mkdir(parents=True, exist_ok=True)
        for number_of, image in enumerate(data.images[data.target == digit][:each]):
            ink = cv2.resize(image.astype(np.float32) / 16, (DIGIT_SIDE, DIGIT_SIDE), interpolation=cv2.INTER_CUBIC)
            opacity = np.clip(4 * (ink - 0.35) + 0.5, 0, 1)
            colour = rng.uniform(0, 255, 3).round()
            pixels = np.dstack([*(np.full_like(opacity, value) for value in colour), 255 * opacity])
            cv2.imwrite(str(kind / f"{word}_{number_of:03d}.png"), pixels.round().astype(np.uint8))
        for voice in VOICES:
            for variant in VARIANTS:
                for speed in SPEEDS:
                    path = kind / f"{word}_{voice}{variant}_{speed}.wav"
                    say = ["espeak-ng", "-v", f"{voice}{variant}", "-s", str(speed), "-w", str(path), word]
                    if path.is_file() or not subprocess.run(say, capture_output=True).returncode:
                        continue
                    raise UserError(f"espeak-ng failed: {' '.join(say)}")
        for path in kind.glob("*.wav"):
            if not soundfile.info(path).frames:
                path.unlink()


# ---------------------------------------------------------------- the table


def rows_of(keys: Sequence[str], seeds: Sequence[int], args: Namespace) -> dict[str, list[Training]]:
    data = ("--train_data_path", str(args.data), "--test_data_path", str(args.data))
    splits = tuple(split for split in SPLITS if (args.data / f"{_list_of(split)}.txt").is_file())
    rows = {}
    for key in keys:
        row = ROWS[key]._replace(flags=ROWS[key].flags.format(weights=args.image_weights))
        rows[key] = [
            Training(row, seed, args.model_dir / f"{key}_seed_{seed}", splits, data, "photographs") for seed in seeds
        ]
    return rows


def _list_of(split: str) -> str:
    """The name of a split's files in the data's root."""
    return split.removeprefix("photographs").lstrip("_") or "test"


def test_again(run: Training, size: int) -> Training:
    """The same checkpoint tested with images of another size, in a folder beside it."""
    other = run._replace(folder=run.folder / f"at_{size}")
    if not other.is_finished():
        data = ["--testset", ",".join(run.splits), "--test_data_path", run.flags[-1], "--gpu", "cpu"]
        how = [
            "--infer_image_size",
            str(size),
            "--imagenet_weights",
            "none",
            "--out_dir",
            str(other.folder / "results"),
        ]
        call(PYTHON, "test_model.py", "--checkpoint", str(run.folder / "best.pth"), *data, *how)
    return other


def cells(runs: Sequence[Training], last: bool = False) -> list[str]:
    """Mean over seeds and, of several, the worst in brackets, in %."""
    return [
        mean_and_worst(
            [figure(run, split, metric, name, last) for run in runs if split in run.splits], name.endswith("_wrong")
        )
        for _, split, name, metric in COLUMNS
    ]


def table(rows: dict[str, list[Training]], sizes: Sequence[int]) -> str:
    lines = []
    for runs in rows.values():
        own = runs[0].configuration()
        size = own.get("infer_image_size") or own["image_size"]
        lines.append([runs[0].row.label, f"{size}", "best", *cells(runs)])
        if any(_chosen(run) != own["epochs"] for run in runs):
            lines.append(["", f"{size}", "last", *cells(runs, last=True)])
        for other in sizes:
            if own["freeze_image"] and other != size:
                lines.append(["", f"{other}", "best", *cells([test_again(run, other) for run in runs])])
    return markdown(["trained with", "px", "epoch", *(head for head, *_ in COLUMNS)], lines)


def _chosen(run: Training) -> int:
    """The epoch of best.pth."""
    return read_results(run, run.splits[0])["checkpoint"]["epoch"]


def difference_table(base: Sequence[Training], other: Sequence[Training]) -> str:
    """Figures of AUD of one row minus those of another on the same samples, runs averaged per sample, in %."""
    lines = []
    for split, metrics in COMPARED:
        if split not in base[0].splits:
            continue
        sides = []
        for runs in (base, other):
            read = [read_run(run.results(split)) for run in runs]
            sides.append((seed_means(Configuration("", "", read, ["AUD"]), "AUD"), read))
        (a, read), (b, _) = sides
        for metric in metrics:
            difference = a[metric]._replace(numerator=a[metric].numerator - b[metric].numerator)
            low, high = interval(bootstrap({metric: difference}, read[0].columns["unit"])[metric])
            value = f"{100 * difference.value():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            lines.append([split.removeprefix("photographs_").replace("_", " "), metric, value])
    return markdown(["split", "figure", f"{base[0].row.label} minus {other[0].row.label}, 95 % interval"], lines)


def make_table(args: Namespace) -> None:
    rows = rows_of(args.rows or tuple(ROWS), list(dict.fromkeys(args.seeds)), args)
    runs = [run for of_seed in zip(*rows.values(), strict=True) for run in of_seed]
    missing = [run for run in runs if not run.is_there()]
    if args.write_docs and missing:
        lacking = ", ".join(str(run.folder) for run in missing)
        raise UserError(f"no finished training in {lacking}: run this without --write_docs first")
    train_all(missing, args.jobs)
    found = {"photographs": f"{table(rows, [OTHER_SIZE])}\n\n*{provenance_line(rows, ONE)}*"}
    if {"listen", "maxpool"} <= rows.keys():
        found["photographs_difference"] = difference_table(rows["listen"], rows["maxpool"])
    print("\n\n".join(found.values()))
    if args.write_docs:
        write_tables({(PAGE, name): text for name, text in found.items()})
        print(f"{PAGE}: {', '.join(found)} written")


# ---------------------------------------------------------------- the command line


def parse_args() -> Namespace:
    parser = ArgumentParser(prog="python -m experiments.photographs", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, out, help_text in (
        ("make", "data/photographs", "write a set of scenes"),
        ("digits", "data/digits", "write a set of handwritten digits that are spoken"),
    ):
        command = commands.add_parser(name, help=help_text)
        if name == "make":
            command.add_argument(
                "--cutouts", type=Path, required=True, metavar="DIR|CSV",
                help="a folder with a folder of images (with alpha) and sounds for each kind, or a list with the "
                "columns kind, image, sound and, if need be, root",
            )  # fmt: skip
        command.add_argument(
            "--photos", type=Path, nargs="+", required=True, help="photographs for the background, or folders of them"
        )
        command.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help="folder to write to")
        command.add_argument("--seed", type=number(int, low=0), default=0, help="random seed")
        command.add_argument(
            "--train", type=number(int, low=1), default=COUNTS["train"], metavar="N", help="number of training pairs"
        )
    command = commands.add_parser("table", help="train every row with every seed, print the table")
    command.add_argument("--data", type=Path, default=Path("data/photographs"), metavar="DIR", help="what `make` wrote")
    command.add_argument("--seeds", type=number(int, low=0), nargs="+", default=[0], help="random seeds")
    command.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"rows: {', '.join(ROWS)} (default: all)"
    )
    command.add_argument(
        "--image_weights", default="auto", metavar="auto|FILE", help="weights of the frozen image encoder"
    )
    command.add_argument("--jobs", type=number(int, low=1), default=1, help="trainings at the same time")
    command.add_argument("--model_dir", type=Path, default=Path("checkpoints/photographs"), help="folder to train into")
    add_boolean(command, "--write_docs", "train nothing, write the tables of finished trainings into docs/")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.command == "table":
        return make_table(args)
    if args.command == "digits":
        kinds = args.out.with_name(f"{args.out.name}_cutouts")
        make_digits(kinds)
    else:
        kinds = args.cutouts
    material = Material(read_kinds(kinds), split_photos(args.photos, args.seed))
    made = make_set(args.out, material, args.seed, {"train": args.train})
    print(f"{args.out}: {len(material.kinds)} kinds; " + ("written" if made else "this very set is there already"))
    if len(several := material.kinds_of("unseen")) < 3:
        print(f"no splits of unseen cut-outs: {len(several)} kinds have more than one, three are needed")


if __name__ == "__main__":
    run_cli(main)
