"""`prepare_data.py synthetic`: its flags, what they do, and a picture of every kind."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import av
import numpy as np
import soundfile

from audio_io import SAMPLE_RATE, log_spectrogram
from synthetic.generate import COUNTS, MARKER, MOST_OBJECTS, SPLITS, generate, make_image
from synthetic.kinds import AUDIO_SECONDS, KINDS, make_sound
from synthetic.probe import probe, probe_table
from synthetic.video import FILMS, generate_films
from utils import UserError, add_boolean, as_user_error, atomic_path, number, write_json

SET, VIDEO = Path("data/synthetic"), Path("data/synthetic_video")  # folders to write to


def preview(path: Path, seed: int, columns: int = 6) -> None:
    """Draw a contact sheet: a row per kind, with images of it and the log spectrogram of one of its sounds."""
    from matplotlib.figure import Figure  # nothing else here needs it, and it takes its time

    widths = [1] * columns + [2.2]
    figure = Figure(figsize=(sum(widths), 0.98 * len(KINDS)))
    axes = figure.subplots(len(KINDS), columns + 1, width_ratios=widths)
    for row, kind in enumerate(KINDS):
        for column in range(columns):
            rng = np.random.default_rng([seed, len(SPLITS), row, column + 1])  # in no split
            axes[row, column].imshow(make_image([kind], rng)[0])
        spectrogram = log_spectrogram(sum(make_sound(kind, rng)))[0]  # (F, L)
        axes[row, -1].imshow(
            spectrogram, origin="lower", aspect="auto", cmap="magma", extent=(0, AUDIO_SECONDS, 0, SAMPLE_RATE / 2000)
        )
        axes[row, 0].set_ylabel(kind)
        axes[row, -1].yaxis.tick_right()
    for axis in (*axes[:, :-1].flat, *axes[:-1, -1]):
        axis.set(xticks=[], yticks=[])
    axes[-1, -1].set(xlabel="s", ylabel="kHz", yticks=[0, 4, 8])
    axes[-1, -1].yaxis.set_label_position("right")
    figure.subplots_adjust(left=0.035, right=0.945, top=0.995, bottom=0.05, wspace=0.04, hspace=0.04)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def add_flags(parser: ArgumentParser) -> None:
    folders = f"folder to write to (default: {SET}, with --video {VIDEO})"
    parser.add_argument("--out", type=Path, metavar="DIR", help=folders)
    parser.add_argument(
        "--seed", type=number(int, low=0, high=2**32 - 1), help="random seed of the set and of the preview (default: 0)"
    )
    parser.add_argument(
        "--train", type=number(int, low=1), metavar="N", help=f"number of training pairs (default: {COUNTS['train']})"
    )
    parser.add_argument(
        "--train_objects",
        type=number(int, low=1, high=MOST_OBJECTS),
        metavar="N",
        help="training and validation images show 1 to N objects, one of which sounds (default: 1, at most "
        f"{MOST_OBJECTS}); give a set with more than 1 a folder of its own, such as --out data/synthetic_3",
    )
    add_boolean(
        parser, "--video", f"write {FILMS} films with the truth of every frame instead: --testset synthetic_video"
    )
    add_boolean(parser, "--force", "overwrite the synthetic set that is in the folder")
    add_boolean(parser, "--probe", "print what simple guesses without learning score on the set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --probe: also write its numbers to this file")
    parser.add_argument(
        "--preview", type=Path, metavar="FILE.png", help="draw every kind with its sound here; writes no set"
    )


def run(args: Namespace) -> None:
    """`prepare_data.py synthetic`. Raises UserError."""
    if args.json and not args.probe:
        raise UserError("--json writes the numbers of --probe: give both")
    if args.preview and args.preview.suffix != ".png":
        raise UserError(f"--preview {args.preview}: the name must end in .png")
    with as_user_error(OSError, soundfile.LibsndfileError, av.FFmpegError):
        if args.video:
            make_films(args)
            return
        if args.preview:
            preview(args.preview, args.seed or 0)
        make_pairs(args)


def make_films(args: Namespace) -> None:
    given = {"--train": args.train, "--train_objects": args.train_objects, "--probe": args.probe,
             "--preview": args.preview}  # fmt: skip
    if wrong := [flag for flag, value in given.items() if value]:
        raise UserError(f"{', '.join(wrong)}: not with --video, which writes films alone")
    out = args.out or VIDEO
    report(out, generate_films(out, args.seed or 0, force=args.force))


def make_pairs(args: Namespace) -> None:
    """Write the set unless only a preview or the probe of a set that is there is wanted; probe it if wanted."""
    out, counts = args.out or SET, {"train": args.train} if args.train else {}
    as_it_is = args.probe and not args.force and args.seed is args.train is args.train_objects is None
    if not (as_it_is and (out / MARKER).is_file()) and (args.probe or not args.preview):
        report(out, generate(out, args.seed or 0, counts, force=args.force, train_objects=args.train_objects or 1))
    if args.probe:
        numbers = probe(out)
        print(probe_table(numbers))
        if args.json:
            write_json(args.json, numbers)


def report(out: Path, made: bool) -> None:
    print(f"{out}: " + ("written" if made else "this very set is there already, nothing to do"))
