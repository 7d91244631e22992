"""The training objectives on the built-in data, side by side: trains what is missing, prints tables, draws images.

    python -m experiments.objectives --seeds 0 1 2          # make objectives: every row
    python -m experiments.objectives --seeds 0 1 2 --rows published listen --epochs 10 --jobs 2
    python -m experiments.objectives --rows published listen --arch resnet18 --epochs 8    # the full-size encoders
    python -m experiments.objectives --seeds 0 1 2 --over_time     # the models are also asked on the built-in films
    python -m experiments.objectives --demo                 # make demo: two rows, training shown as it runs
    python -m experiments.objectives --demo --export checkpoints/demo.pth
    python -m experiments.objectives --seeds 0 1 2 --write_docs    # trains nothing: tables of finished runs into docs/

Every training goes through train_script.sh, into a folder for each row, seed and architecture. All figures come from
results.json of these folders. Except in the demonstration, a training takes one thread, and a finished one is kept.
The demonstration's table in docs/ is that of its two rows, `published_one` and `listen_one`.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.film import draw_film
from experiments.runs import DATA, SPLITS, Row, Rows, Training, call, make_data, train_all
from experiments.tables import TABLES, demo_table, objective_table, over_time_table, provenance_line, write_tables
from reports.pictures import contact_sheet, side_by_side_on_synthetic
from synthetic.command import VIDEO
from synthetic.video import Task, write_film
from transforms import load_image
from utils import ArgumentParser, UserError, add_boolean, load_checkpoint, number, run_cli, save_checkpoint

# Inference settings of listen, which all other rows except published use, too.
INFERENCE = "--recipe infer_sharpening=0.1 infer_smoothing=0.1"
SHARE = f"--weights share_contrast=1 lam3=0 {INFERENCE}"


ROWS = {
    "published": Row("published"),
    "maxpool": Row("max-pool contrast", f"--objective maxpool {INFERENCE}"),
    "share": Row("share contrast", SHARE),
    "listen": Row("share contrast + foreign claims (listen)", "--objective listen"),
    "listen_silence": Row("the same + silence", "--objective listen --weights silence=1"),
    "published_one": Row("published", objects=1),
    "share_one": Row("share contrast", SHARE, objects=1),
    "listen_one": Row("share contrast + foreign claims (listen)", "--objective listen", objects=1),
}
PICTURED = ("published", "maxpool", "listen")
DEMO = {"published": ("published_one", "demo"), "listening": ("listen_one", "demo_listen")}  # label: row, folder
OVER_TIME = ("published", "maxpool", "listen", "listen_silence")  # rows that are asked on films
WINDOWS = (1.6, 0.6)  # s of sound around a moment: what the models were trained with, and less
DEMO_SPLITS = SPLITS[:3]
DEMO_FILM_SEED, DEMO_FILM = 1, 3  # of the clip that ends the demonstration: in no test set
# Full-size encoders: share contrast fell further in its first epochs with this learning rate and batch size than with
# those of the small ones.
ARCHITECTURES = {"small": "", "resnet18": "--arch resnet18 --image_size 224 --lr 3e-4 --batch_size 32"}


CHECKPOINTS, DOCS = Path("checkpoints"), Path("docs")
NOT_IN_EXPORT = ("optimizer", "scaler", "random", "sums", "lines")
NO_BOXES = (
    "built-in data, not VGG-Sound; no box is used in training or in choosing checkpoints (the sharpening of the "
    "published rows, the weights of our losses and the smoothing were chosen with the boxes of other data)"
)


# ---------------------------------------------------------------- the trainings


def objective_rows(
    keys: Sequence[str], seeds: Sequence[int], folder: Path, arch: str = "small", epochs: int | None = None
) -> Rows:
    """The runs of these rows, in the order of the table. epochs: those of the recipe if None."""
    name = "" if arch == "small" else f"_{arch}"
    given = [] if epochs is None else ["--epochs", str(epochs)]

    def training(key: str, seed: int) -> Training:
        data = ["--train_data_path", str(DATA[ROWS[key].objects]), "--test_data_path", str(DATA[1])]
        flags = (*ARCHITECTURES[arch].split(), *data, *given)
        return Training(ROWS[key], seed, folder / f"{key}{name}_seed_{seed}", SPLITS, flags)

    return {key: [training(key, seed) for seed in seeds] for key in ROWS if key in keys}


def demo_rows(seeds: Sequence[int]) -> Rows:
    return {
        label: [Training(ROWS[key], seed, CHECKPOINTS / f"{folder}_seed_{seed}", DEMO_SPLITS) for seed in seeds]
        for label, (key, folder) in DEMO.items()
    }


# ---------------------------------------------------------------- the two programs


def compare(keys: Sequence[str], seeds: Sequence[int], args) -> None:
    """Train what is missing of the rows, print their tables, draw some of them side by side."""
    arch = args.arch or "small"
    rows = objective_rows(keys, seeds, args.model_dir, arch, args.epochs)
    first_seeds_first = [run for of_seed in zip(*rows.values()) for run in of_seed]
    missing = [run for run in first_seeds_first if not run.is_there()]
    for objects in sorted({1, *(run.row.objects for run in missing)}):  # 1: what all are tested on
        make_data(objects)
    train_all(missing, args.jobs or os.cpu_count() or 1)
    for name, (title, _) in TABLES.items():
        print(f"{title}\n\n{objective_table(name, rows)}\n")
    print(f"{provenance_line(rows)}; {NO_BOXES}")
    if args.over_time:
        asked = {key: runs for key, runs in rows.items() if key in OVER_TIME}
        ask_over_time(asked)
        print(f"\nOver time, on `synthetic_video`\n\n{over_time_table(asked, WINDOWS)}")
    if pictured := {key: rows[key] for key in PICTURED if key in rows}:
        name = "objectives.png" if arch == "small" else f"objectives_{arch}.png"
        draw_side_by_side(pictured, args.picture or args.model_dir / name)


def ask_over_time(rows: Rows) -> None:
    """Test the models on the built-in films with every one of WINDOWS, where that was not done yet."""
    todo = [(run, window) for runs in rows.values() for run in runs for window in WINDOWS]
    todo = [(run, window) for run, window in todo if not run.over_time(window).is_file()]
    if todo and not VIDEO.is_dir():
        call(sys.executable, "prepare_data.py", "synthetic", "--video")
    for run, window in todo:
        model = "--checkpoint", str(run.folder / "best.pth"), "--imagenet_weights", "none", "--gpu", "cpu"
        films = "--testset", "synthetic_video", "--test_data_path", str(VIDEO), "--window", str(window)
        call(sys.executable, "test_model.py", *model, *films, "--out_dir", str(run.over_time(window).parents[1]))


def draw_side_by_side(rows: Rows, path: Path) -> None:
    """The models of the first seed on the same images and audio."""
    checkpoints = {label: runs[0].folder / "best.pth" for label, runs in rows.items()}
    side_by_side_on_synthetic(checkpoints, DATA[1], path)
    print(f"\n{path}: {', '.join(checkpoints)} on the same images, with the audio of each of their objects")


def demonstrate(seeds: Sequence[int], exported: Path | None) -> None:
    """Make the data, train both objectives where the user sees it, print one table, name what to look at."""
    rows = demo_rows(seeds)
    make_data(1)
    for run in [run for runs in rows.values() for run in runs]:
        run.note()
        call(*run.command())
    print(f"\n{demo_table(rows, DATA[1])}\n")
    print(f"{provenance_line(rows)}; without learning: python prepare_data.py synthetic --probe")
    picture = CHECKPOINTS / "demo_objectives.png"
    draw_side_by_side(rows, picture)
    first = [runs[0] for runs in rows.values()]
    film = write_demo_film({label: runs[0].folder / "best.pth" for label, runs in rows.items()}, bool(exported))
    if exported:
        export(first[0].folder / "best.pth", exported)
        export(first[1].folder / "best.pth", exported.with_name("listen.pth"))
        draw_samples(exported, DOCS / "demo.png")
    print("\nlook at the tables and images:")
    for run in first:
        for split in run.splits:
            print(f"  {run.results(split)}   {run.results(split).with_name('contact_sheet.png')}")
        print(f"  {run.folder / 'curves.png'}")
    print(f"  {picture}: one image, the audio of each of its objects: which map moves with it?")
    print(f"  {film}: a film under both objectives; dark where nothing in view sounds")


def write_demo_film(checkpoints: dict[str, Path], for_docs: bool) -> Path:
    """A film of a built-in clip under the objectives; for_docs: docs/demo.gif, too."""
    target = CHECKPOINTS / "demo_film.mp4"
    with tempfile.TemporaryDirectory() as folder:
        task = Task(Path(folder), DEMO_FILM_SEED, DEMO_FILM)
        write_film(task)
        clip = Path(folder) / "clips" / f"{task.name}.mp4"
        draw_film(clip, checkpoints, target, DOCS / "demo.gif" if for_docs else None)
    return target


def export(source: Path, target: Path) -> None:
    """A checkpoint without what only resuming needs, small enough to be committed."""
    state = {name: value for name, value in load_checkpoint(source).items() if name not in NOT_IN_EXPORT}
    save_checkpoint(target, state)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB, sha256 {digest}")


def draw_samples(checkpoint: Path, target: Path, each: int = 2) -> None:
    """A sheet of the first samples of every split, as the exported model scores them."""
    folder = CHECKPOINTS / "demo_results"
    flags = ["--imagenet_weights", "none", "--save_overlays", "true", "--out_dir", str(folder), "--gpu", "cpu"]
    call(sys.executable, "test_model.py", "--checkpoint", str(checkpoint), "--testset", ",".join(DEMO_SPLITS), *flags)
    samples = [path for split in DEMO_SPLITS for path in sorted((folder / split / "samples").glob("*.png"))[:each]]
    contact_sheet([np.array(load_image(path)) for path in samples], target)
    print(f"{target}: {len(samples)} samples")


def write_docs(keys: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Put every table whose trainings are all finished into its page of docs/. UserError where none is.

    keys: the rows that the tables of docs/listening.md are to have.
    """
    objectives = objective_rows(keys, seeds, folder)
    demo = {label: objective_rows([key], seeds, folder)[key] for label, (key, _) in DEMO.items()}
    asked = {key: runs for key, runs in objectives.items() if key in OVER_TIME}
    wanted = {
        (DOCS / "listening.md", "fixed"): (objectives, lambda: objective_table("fixed", objectives)),
        (DOCS / "listening.md", "half"): (objectives, lambda: objective_table("half", objectives)),
        (DOCS / "listening.md", "negatives"): (objectives, lambda: objective_table("negatives", objectives)),
        (DOCS / "listening.md", "over_time"): (asked, lambda: over_time_table(asked, WINDOWS)),
        (DOCS / "results.md", "demo"): (demo, lambda: demo_table(demo, DATA[1])),
    }
    tables = {}
    for (page, name), (rows, table) in wanted.items():
        runs = [run for of_row in rows.values() for run in of_row]
        lacking = [run.folder for run in runs if not run.is_there()]
        if name == "over_time":
            lacking += [path for run in runs for path in map(run.over_time, WINDOWS) if not path.is_file()]
        if lacking or not runs:
            print(f"{page}: table {name} stays as it is: not finished: {', '.join(map(str, lacking)) or 'its rows'}")
        else:
            tables[page, name] = f"{table()}\n\n*{provenance_line(rows)}*"
    if not tables:
        raise UserError("no table has all its trainings: run make objectives first")
    write_tables(tables)
    print("\n".join(f"{page}: table {name} written" for page, name in tables))


# ---------------------------------------------------------------- the command line


def main() -> None:
    parser = ArgumentParser(description="Train the objectives on the built-in data, tabulate and draw them.")
    parser.add_argument(
        "--seeds",
        type=number(int, low=0, high=2**32 - 1),
        nargs="+",
        default=[0],
        help="random seeds; every row is trained once with each",
    )
    add_boolean(
        parser, "--demo", "only the demonstration: published and listen on one-object images, always trained anew"
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE.pth",
        help="with --demo: write the first published model here, and the first listen.pth beside it",
    )
    add_boolean(parser, "--over_time", f"also ask the models of {', '.join(OVER_TIME)} on the built-in films")
    add_boolean(parser, "--write_docs", "train nothing, write the tables of finished trainings into docs/")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"rows: {', '.join(ROWS)} (default: all)"
    )
    parser.add_argument("--epochs", type=number(int, low=1), help="epochs of every training (default: the recipe's)")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="encoders of every training (default: small)")
    parser.add_argument("--jobs", type=number(int, low=1), help="trainings at the same time (default: one per core)")
    parser.add_argument("--model_dir", type=Path, default=Path("checkpoints/objectives"), help="folder to train into")
    parser.add_argument("--picture", type=Path, help="PNG of some models side by side (default: in --model_dir)")
    args = parser.parse_args()
    seeds = list(dict.fromkeys(args.seeds))
    given = [f"--{name}" for name in ("rows", "epochs", "arch", "jobs", "picture") if getattr(args, name) is not None]
    given = [name for name in given if args.demo or name != "--rows"] + ["--over_time"] * args.over_time
    if given and (args.demo or args.write_docs):
        raise UserError(f"{', '.join(given)}: --demo and --write_docs have recipes of their own, --demo also its rows")
    if args.export and not args.demo:
        raise UserError("--export writes a model of --demo: give both")
    if args.write_docs:
        write_docs(args.rows or tuple(ROWS), seeds, args.model_dir)
    elif args.demo:
        demonstrate(seeds, args.export)
    else:
        compare(args.rows or tuple(ROWS), seeds, args)


if __name__ == "__main__":
    run_cli(main)
