"""Score localization maps on test sets, a trained model's or anyone's, draw what they find, compare results.

    python test_model.py --checkpoint checkpoints/demo.pth --testset synthetic --gpu cpu
    python test_model.py --model_dir ./checkpoints --experiment_name NAME --testset vggss \\
        --test_data_path /path/to/VGGSound/ --test_gt_path metadata/vggss.json --gpu 0 --save_visualizations
    python test_model.py --checkpoint checkpoints/demo.pth --testset synthetic_video --gpu cpu
    python test_model.py --maps FILE.npz --testset vggss --test_gt_path metadata/vggss.json
    python test_model.py --compare A/results/vggss/results.json B/results/vggss/results.json
"""

from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from annotations import first_ids, read_ids
from dataset import TRAIN_SETS, EvaluationPairs, TrainingPairs, select_training_pairs
from distributed import any_rank, is_main, own_device, process_group, under_torchrun
from film.localizer import Localizer, add_window
from film.over_time import ROOT, TRUTH, publish_films, score_films
from maps import MAP_SIZE, enlarge_absolute
from models import Model, Trained, load
from recipes import add_infer_image_size
from reports.diagnose import check_slots, diagnose
from reports.own_files import note_own, remove_own
from reports.page import Gallery
from reports.pictures import Drawer, images_of
from reports.table import publish, training_overlap
from resnet import ObjectSaliency
from scoring.bootstrap import RESAMPLES
from scoring.compare import compare
from scoring.evaluate import Evaluation, OnBatch, evaluate, evaluate_stored, match_ids
from scoring.maps_file import MapWriter, StoredMaps
from scoring.negatives import NEGATIVES
from scoring.questions import Negatives
from scoring.summary import ScoredBatch
from sets import add_run_data_flags, add_test_set_flags, build_ground_truths, build_test_sets, requests
from utils import (
    ArgumentParser,
    UserError,
    add_boolean,
    add_workers,
    as_user_error,
    check_writable,
    number,
    pick_device,
    run_cli,
)

FILMS = "synthetic_video"  # a test set of films, beside those of pairs
DEFAULT_BATCH = 256  # of training, where a checkpoint does not say
HEARD_SECONDS = 5.0  # of the audio in the page, where no model says how much it hears


def checkpoint_path(args) -> Path:
    """--checkpoint best or latest of the experiment, or a path of its own."""
    if args.checkpoint not in ("best", "latest"):
        return Path(args.checkpoint)
    if not args.experiment_name:
        raise UserError("say which model: --experiment_name NAME, or --checkpoint PATH (or maps: --maps FILE.npz)")
    return Path(args.model_dir) / args.experiment_name / f"{args.checkpoint}.pth"


def load_saliency(source: str, device: torch.device) -> ObjectSaliency | None:
    """The object prior; None when it was not asked for, or, with a printed line, when "auto" could not download it.

    A download that fails for one process leaves the prior out for all.
    """
    if source == "none":
        return None
    saliency = None
    try:
        saliency = ObjectSaliency(source).to(device)
    except ValueError as error:
        if source != "auto":
            raise UserError(str(error)) from error
        print(f"OBJ_PRIOR, OGL and IQR_OGL are left out: {error}")
    return None if any_rank(saliency is None, device) else saliency


# ---------------------------------------------------------------- what is kept of a pass


class Keepsakes:
    """Pictures, page and maps of one test set, as far as asked for; written when the pass has ended without an error.

    dataset: the pairs whose images are drawn; None where nothing is drawn.
    """

    def __init__(self, args, folder: Path, dataset: EvaluationPairs | None, count: int) -> None:
        self.drawer = self.gallery = self.writer = None
        self.folder, self.scored = folder, Path(args.maps).resolve() if args.maps else None
        self.on_batch: list[OnBatch] = []
        if dataset:
            self.audio_of = dataset.waveform
            self.image_of = images_of(dataset.pairs)
        if args.save_visualizations or args.save_overlays:
            sheet, overlays = folder / "contact_sheet.png", folder / "samples" if args.save_overlays else None
            self.drawer = Drawer(sheet, dataset.ground_truth, count, self.image_of, overlays, args.num_workers)
            self.on_batch.append(self.drawer)
        if args.report:
            self.gallery = Gallery(folder, seconds=dataset.audio_seconds)
            self.on_batch.append(self.add_to_gallery)
        if args.save_maps:
            self.writer = MapWriter(folder / "maps.npz", count)
            self.on_batch.append(self.add_maps)

    def add_to_gallery(self, batch: ScoredBatch) -> None:
        for i, name in enumerate(batch.ids):
            maps = {key: values[i].cpu().numpy() for key, values in batch.maps.items()}
            for key, asked in batch.negatives.items():  # of several seeds the first
                maps |= {
                    f"{key}_{kind}": enlarge_absolute(values[i, :1], maps[key].shape)[0].numpy()
                    for kind, values in asked.items()
                }
            with as_user_error(ValueError):
                self.gallery.add(name, self.image_of(name), batch.truth[i].numpy(), maps, self.audio_of(name))

    def add_maps(self, batch: ScoredBatch) -> None:
        asked = {f"{name}_{kind}": maps for name, own in batch.negatives.items() for kind, maps in own.items()}
        self.writer.add(batch.ids, batch.raw | batch.scalars | asked)

    def clear(self) -> None:
        """Remove what an earlier test left here, as it does not belong to the new results; not what is scored.

        Once these are written: where they cannot be, nothing of the earlier test is lost.
        """
        remove_own(self.folder, keep=self.scored)

    def finish(self, evaluation: Evaluation) -> None:
        files = []
        if self.drawer:
            files += self.drawer.finish()
            print("pictures: " + ", ".join(map(str, [files[0], *([self.drawer.overlays] if len(files) > 1 else [])])))
        if self.gallery:
            print(f"report: {self.gallery.finish(evaluation.results, evaluation.rows)}")
            files += self.gallery.written
        if self.writer:
            settings = evaluation.results["settings"]
            chosen = evaluation.results.get("negatives", {}).get("thresholds", {})
            numbers = {f"{name}_threshold": threshold["value"] for name, threshold in chosen.items()}
            same = {"interpolation": settings["interpolation"], "alpha": settings["alpha"]}
            files.append(self.writer.finish(**same, **numbers))
            print(f"maps: {files[-1]}")
        note_own(self.folder, files)


# ---------------------------------------------------------------- the two ways of scoring


def score_model(args) -> None:
    """Several processes share the samples of each set; the first one writes."""
    device = own_device(args.gpu)
    with process_group(device):
        path = checkpoint_path(args)
        trained = load(path, device)
        model = trained.model.to(memory_format=torch.channels_last)  # rounds as in training
        if args.diagnose:
            check_slots(model)
        set_image_size(model, args.infer_image_size)
        test_sets = build_test_sets(args, model.infer_image_size, model.shape["audio_seconds"])
        settings = asked_inference(args, trained) | {"alpha": 0.6 if args.alpha is None else args.alpha}
        settings |= {"saliency": load_saliency(args.imagenet_weights, device), "resamples": RESAMPLES}
        settings["threshold"] = trained.threshold
        run = {"batch_size": args.batch_size, "workers": args.num_workers, "seed": args.seed}
        asked = negatives_by_set(args, trained, path, test_sets)
        out_dir = make_out_dir(args, results_folder(args, path), asked)
        for name, dataset in test_sets.items():
            if name not in asked:
                continue
            keepsakes = Keepsakes(args, out_dir / name, dataset, len(dataset)) if is_main() else None
            on_batch = keepsakes.on_batch if keepsakes else ()
            score = partial(evaluate, model, device=device, **settings, **run, negatives=asked[name])
            noisy_sets = {f"{level:g}": dataset.noisy(level) for level in args.snr}  # refused before anything is scored
            evaluation = score(dataset, on_batch=on_batch)
            noisy = {level: score(noisy_set) for level, noisy_set in noisy_sets.items()}
            if evaluation is None:
                continue
            if noisy:
                kept = ("maps", "intervals", "retrieval")
                evaluation.results["snr"] = {
                    level: {key: found.results[key] for key in kept} for level, found in noisy.items()
                }
            overlap = training_overlap(path, dataset.ground_truth, [pair.id for pair in dataset.pairs])
            publish(evaluation, out_dir / name, **about_set(args, name), checkpoint=trained.about, **overlap)
            keepsakes.clear()
            keepsakes.finish(evaluation)
            if args.diagnose:
                batch = training_batch(path, trained, args.seed)
                pictures = diagnose(model, dataset, device, out_dir / name / "diagnosis", batch, **run)
                note_own(out_dir / name, pictures)
                print("\n".join(f"diagnosis: {picture}" for picture in pictures))


def asked_inference(args, trained: Trained) -> dict[str, float]:
    """How maps are asked for: as the checkpoint says, unless a flag does."""
    given = {name: getattr(args, name) for name in trained.inference if getattr(args, name) is not None}
    return trained.inference | given


def set_image_size(model: Model, asked: int | None) -> None:
    """Test a model with images of the size that was asked for. UserError for one that it does not take."""
    model.infer_image_size = asked or model.infer_image_size
    with as_user_error(ValueError):
        model.imgnet.check_size(model.infer_image_size)


NOT_FOR_FILMS = ("test_gt_path", "test_list", "alpha", "negatives", "snr", "save_visualizations", "save_overlays",
                 "save_maps", "report", "diagnose")  # fmt: skip


def film_root(args) -> Path:
    return Path(args.test_data_path) if args.test_data_path else ROOT


def score_film_set(args) -> None:
    """Maps over the built-in films, whose truth is known in every frame."""
    path, device = checkpoint_path(args), pick_device(args.gpu)
    trained = load(path, device)
    set_image_size(trained.model, args.infer_image_size)
    localizer = Localizer(trained._replace(inference=asked_inference(args, trained)), device, args.window)
    out_dir = make_out_dir(args, results_folder(args, path), [FILMS])
    results, rows = score_films(localizer, film_root(args), RESAMPLES, args.seed)
    publish_films(results, rows, out_dir / FILMS, testset=FILMS, checkpoint=trained.about)


def negatives_by_set(
    args, trained: Trained, path: Path, test_sets: Mapping[str, EvaluationPairs]
) -> dict[str, Negatives | None]:
    """The negative audio that each set is asked with: what the flag says, all of it for the page and robust sets.

    A model without a threshold can be asked with none: UserError, before anything is scored, where that is all that was
    wanted. Of `all` sets the robust ones are left out then, and pages do without, with a line each.
    """
    mend = f"{path} has no universal threshold: python -m scoring.threshold {path} PAIRS chooses one"
    robust = [name for name, dataset in test_sets.items() if dataset.ground_truth.robust]
    if trained.threshold is None:
        if args.negatives or (robust and args.testset != "all"):
            raise UserError(f"negative audio: {mend}")
        if args.report:
            print(f"no negative audio in the page: {mend}")
        if robust:
            print(f"left out: {', '.join(robust)} ({mend})")
        return {name: None for name in test_sets if name not in robust}
    kinds = {name: args.negatives or (NEGATIVES if args.report or name in robust else ()) for name in test_sets}
    return {name: Negatives(tuple(own), args.negative_seeds) if own else None for name, own in kinds.items()}


def training_batch(path: Path, trained: Trained, seed: int) -> TrainingPairs | None:
    """As many training pairs as a batch held, drawn by seed; None, and a line that says why, where there are none."""
    flags, shape, listed = trained.about["training"], trained.model.shape, path.with_name("train_ids.txt")
    try:
        if flags.get("trainset") not in TRAIN_SETS or not listed.is_file():
            raise UserError(f"the checkpoint names no training set, or {listed} is not there")
        ids = read_ids(listed)
        size = min(flags.get("batch_size", DEFAULT_BATCH), len(ids))
        chosen = {ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:size]}
        root, metadata = flags.get("train_data_path"), flags.get("metadata", "metadata")
        selection = select_training_pairs(flags["trainset"], root, metadata, str(listed), allow_missing=True)
        pairs = [pair for pair in selection.pairs if pair.id in chosen]
        if len(pairs) < 2:
            raise UserError(f"of the pairs of {listed} too few are there")
    except UserError as error:
        print(f"diagnosis: a batch of test pairs stands in for one of training ({error})")
        return None
    return TrainingPairs(pairs, shape["image_size"], shape["audio_seconds"], "none")


def score_file(args) -> None:
    """Anyone's maps: no model, and images only where something is drawn."""
    of_models = {"--experiment_name": args.experiment_name, "--diagnose": args.diagnose, "--save_maps": args.save_maps,
                 "--alpha": args.alpha is not None, "--infer_sharpening": args.infer_sharpening,
                 "--infer_smoothing": args.infer_smoothing is not None, "--checkpoint": args.checkpoint != "best",
                 "--infer_image_size": args.infer_image_size, "--compare_map": args.compare_map,
                 "--negatives": args.negatives, "--negative_seeds": args.negative_seeds != 1,
                 "--snr": args.snr, "--window": args.window}  # fmt: skip
    wrong = [flag for flag, given in of_models.items() if given]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: not with --maps, which scores a file and no model")
    if args.testset == "all":
        raise UserError("--maps needs the test set whose ids its maps have: --testset NAME")
    stored, truths = StoredMaps(args.maps), build_ground_truths(args)
    drawn = args.save_visualizations or args.save_overlays or args.report
    datasets = build_test_sets(args, MAP_SIZE, HEARD_SECONDS) if drawn else {}
    for name, dataset in datasets.items():
        seen = {pair.id for pair in dataset.pairs}
        blind = [i for i in stored.ids if i in truths[name].ids and i not in seen]
        if blind:
            raise UserError(
                f"{len(blind)} maps have no image to be drawn on: {first_ids(blind)}; leave --report, "
                "--save_visualizations and --save_overlays out, or give all images as --test_data_path"
            )
    for name, ground_truth in truths.items():
        match_ids(stored, ground_truth, args.allow_missing)  # of all sets before the first is scored
        if ground_truth.silent and not stored.scalars:
            print(f"{name} has pairs whose source is not in view, the file no `confidence`: no AP, max_F1, presence_AP")
    out_dir = make_out_dir(args, stored.path.with_name(f"{stored.path.stem}_results"), truths)
    for name, ground_truth in truths.items():
        keepsakes = Keepsakes(args, out_dir / name, datasets.get(name), len(stored.ids))
        evaluation = evaluate_stored(
            stored, ground_truth, args.batch_size, args.allow_missing, args.seed, RESAMPLES, keepsakes.on_batch
        )
        publish(evaluation, out_dir / name, **about_set(args, name))
        keepsakes.clear()
        keepsakes.finish(evaluation)


def about_set(args, name: str) -> dict[str, str]:
    """What a result says of its set: the name and, where one was given, the list in place of the set's own."""
    test_list = requests(args)[name].test_list
    return {"testset": name} | ({"test_list": test_list} if test_list else {})


def results_folder(args, checkpoint: Path) -> Path:
    """Where results lie unless --out_dir says it: in the run's folder, else beside the checkpoint."""
    own = "results_last" if args.checkpoint == "latest" else "results"
    return checkpoint.parent / (own if args.experiment_name else f"{checkpoint.stem}_results")


def make_out_dir(args, default: Path, names: Iterable[str]) -> Path:
    """Before the work: a place that cannot be written to shows now. names: of the sets, which get a folder each."""
    out_dir = Path(args.out_dir) if args.out_dir else default
    for name in names:
        check_writable(out_dir / name)
    out_dir.mkdir(parents=True, exist_ok=True)
    return out_dir


def negative_kinds(text: str) -> tuple[str, ...]:
    """An argparse type: kinds of negative audio, separated by commas."""
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in NEGATIVES]:
        raise ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(NEGATIVES)}")
    return tuple(kind for kind in NEGATIVES if kind in kinds)


def decibels(text: str) -> tuple[float, ...]:
    """An argparse type: signal-to-noise ratios, separated by commas, the cleanest first."""
    levels = {number(float, low=-60, high=120)(level) for level in text.split(",")}
    return tuple(sorted(levels, reverse=True))


def parse_args():
    parser = ArgumentParser(description="Score a trained model, or maps of any method, on test sets; compare results.")
    group = parser.add_argument_group("what is scored")
    group.add_argument("--model_dir", default="./checkpoints", help="folder in which training put its runs")
    group.add_argument("--experiment_name", help="name of the training run: its folder in --model_dir")
    group.add_argument("--checkpoint", default="best", help="best or latest of the run, or a checkpoint's path")
    weights = "ImageNet weights of the object prior, for the maps OBJ_PRIOR, OGL and IQR_OGL: auto (download), none "
    weights += "(without these maps), or a file"
    group.add_argument("--imagenet_weights", default="auto", help=weights)
    group.add_argument("--maps", help="score the maps in this .npz file, of any method, instead of a model")
    group.add_argument("--compare", nargs="+", metavar="RESULTS.JSON", help="score nothing, compare results in a table")
    group.add_argument("--compare_map", help="with --compare: show only this map (default: AUD and IQR)")
    add_boolean(group, "--common", "with --compare: on the samples that all results have, with their number")
    group = parser.add_argument_group("data")
    add_test_set_flags(group, default="synthetic")
    several = "images of a custom set have several sources, each heard in an entry of its own (default: where its "
    several += "annotation names one image with different audio)"
    add_boolean(group, "--interactive", several, default=None)
    add_run_data_flags(group)
    add_workers(group)
    group = parser.add_argument_group("maps of a model")
    add_infer_image_size(group, "as the model was trained for")
    group.add_argument("--alpha", type=number(float, low=0, high=1), help="weight of AUD in IQR and OGL (default: 0.6)")
    sharpening = "factor on the attention logits of maps (default: as the model was trained for, else the paper's 0.1)"
    group.add_argument("--infer_sharpening", type=number(float, above=0), help=sharpening)
    smoothing = "smoothing of the token maps: kernel (s, 1-2s, s) along both axes (default: as the model was trained "
    smoothing += "for, else the paper's 0)"
    group.add_argument("--infer_smoothing", type=number(float, low=0, high=1 / 3), help=smoothing)
    add_window(group, f"{FILMS}: ")
    group = parser.add_argument_group("harder questions")
    negatives = f"ask every image also with negative audio: {', '.join(NEGATIVES)}, several separated by commas "
    negatives += "(default: all with --report, else none); files of --maps hold maps of it, see docs/protocols.md"
    group.add_argument("--negatives", type=negative_kinds, metavar="KIND,KIND", help=negatives)
    seeds = "seeds of noise and off-screen audio, each of which costs a pass over the set; published tables have 10"
    group.add_argument("--negative_seeds", type=number(int, low=1), default=1, metavar="N", help=seeds)
    snr = "score the set again with white noise in all audio, so many dB below it: levels separated by commas"
    group.add_argument("--snr", type=decibels, default=(), metavar="DB,DB", help=f"{snr}, such as 20,10,5")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--gpu", default="0", help="number of a CUDA device, or cpu; torchrun gives every process its own"
    )
    batch_size = "pairs per batch; changes speed and memory only"
    group.add_argument("--batch_size", type=number(int, low=1), default=64, help=batch_size)
    seed = "random seed of the wrong audio that each image is tested with, and of the bootstrap"
    group.add_argument("--seed", type=number(int, low=0, high=2**32 - 1), default=0, help=seed)
    group = parser.add_argument_group("what is written, beside results.json and per_sample.csv")
    out_dir = "folder of results (default: results/ in the run's folder, results_last/ for --checkpoint latest, else "
    out_dir += "beside --checkpoint PATH or --maps FILE)"
    group.add_argument("--out_dir", help=out_dir)
    add_boolean(group, "--save_visualizations", help="a contact sheet: the maps of 16 samples over their images")
    add_boolean(group, "--save_overlays", help="the contact sheet, and samples/: an overlay of every sample's maps")
    add_boolean(group, "--save_maps", help="maps.npz: the maps of all samples, which --maps can score again")
    add_boolean(group, "--report", help="report.html: a page for a browser that shows every sample with its audio")
    add_boolean(
        group, "--diagnose", help="drawings of the slots (t-SNE, attention) and of a training batch's false negatives"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if under_torchrun() and (args.compare or args.maps is not None):
        raise UserError("--compare and --maps run in one process: start them without torchrun")
    if args.compare:
        if args.maps is not None or args.report or args.save_maps or args.diagnose or args.out_dir:
            raise UserError(
                "--compare only reads results: --maps, --report, --save_maps, --diagnose, --out_dir are not for it"
            )
        print(compare(args.compare, args.compare_map, args.common))
    elif args.maps is not None:
        score_file(args)
    elif args.compare_map or args.common:
        raise UserError("--compare_map and --common belong to --compare")
    elif args.testset == FILMS and args.interactive is not None:
        raise UserError("--interactive is for custom: films have no entries that share an image")
    else:
        names = [name for name in args.testset.split(",") if name != FILMS]
        films = FILMS in args.testset.split(",") or (args.testset == "all" and (film_root(args) / TRUTH).is_file())
        given = [f"--{flag}" for flag in NOT_FOR_FILMS if str(getattr(args, flag)) not in ("None", "False", "()")]
        if given and not names:
            raise UserError(f"{', '.join(given)}: not with {FILMS}, which has tables and truth of its own")
        if args.window and not films:
            raise UserError(f"--window is for films, --testset {FILMS}: a pair's sound is as long as the model hears")
        if films and under_torchrun():
            raise UserError(f"{FILMS} is scored in one process: start it without torchrun")
        if names:
            args.testset = ",".join(names)
            score_model(args)
        if films:
            score_film_set(args)


if __name__ == "__main__":
    run_cli(main)
