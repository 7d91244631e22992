"""Score a trained model on test sets, and draw what it finds.

    python test_model.py --checkpoint checkpoints/demo.pth --testset synthetic --gpu cpu
    python test_model.py --model_dir ./checkpoints --experiment_name NAME --testset vggss \\
        --test_data_path /path/to/VGGSound/ --test_gt_path metadata/vggss.json --gpu 0 --save_visualizations true

B batch, K slots, h x w image grid; maps are scored at 224 x 224.
"""

import csv
import io
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import metrics
from dataset import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERACTIVE_SETS,
    TEST_SETS,
    EvaluationPairs,
    Sample,
    Selection,
    build_test_set,
    make_loader,
    read_ids,
)
from dataset_avs import AVS_SETS, build_avs_set
from metrics import MapScores, ReferenceScores, normalize_maps, upsample_maps
from model_slot import TARGET, JointSlotModel, fuse_maps
from report import results_table
from resnet import ObjectSaliency
from utils import (
    ArgumentParser,
    UserError,
    as_user_error,
    boolean,
    load_checkpoint,
    number,
    pick_device,
    provenance,
    run_cli,
    write_json,
    write_text,
)
from visualize import contact_sheet, denormalize, sample_panel

ALL_SETS = TEST_SETS | AVS_SETS
SHEET_SAMPLES = 12
DRAWN_MAPS = ("AUD", "IMG_QUERY", "IQR")


class WithWrongSound(Dataset):
    """Every item of a set with a spectrogram of another class (another sound where classes are unknown)."""

    def __init__(self, dataset: EvaluationPairs, seed: int) -> None:
        self.dataset = dataset
        if len(dataset) < 2:
            raise UserError(f"a test set of {len(dataset)} pair has no wrong sound to ask with: give it two or more")
        sounds = [str(pair.audio) for pair in dataset.pairs]  # the frames of a video share one
        with as_user_error(ValueError):
            self.partners = metrics.derangement(dataset.class_names if all(dataset.class_names) else sounds, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Sample, torch.Tensor]:
        return self.dataset[index], self.dataset.spectrogram(int(self.partners.permutation[index]))


class Evaluation(NamedTuple):
    results: dict[str, Any]  # nested, every figure a fraction of 1
    rows: list[dict[str, Any]]  # one per sample


class SetScores:
    """Everything that one pass over a test set accumulates: scalars and target slots per sample, never maps."""

    def __init__(self) -> None:
        self.maps: dict[str, MapScores] = {}
        self.references = ReferenceScores()
        self.ids: list[str] = []
        self.class_names: list[str] = []
        self.areas: list[torch.Tensor] = []
        self.image_target: list[torch.Tensor] = []
        self.audio_target: list[torch.Tensor] = []

    def add(
        self, batch: Sample, maps: dict[str, torch.Tensor], image_slots: torch.Tensor, audio_slots: torch.Tensor
    ) -> None:
        truth = batch.truth.to(image_slots.device)
        for name, scored in maps.items():
            self.maps.setdefault(name, MapScores()).add(scored, truth)
        self.references.add(truth)
        self.ids += batch.id
        self.class_names += batch.class_name
        self.areas.append((truth > 0).flatten(1).sum(1).cpu())
        self.image_target.append(image_slots[:, TARGET].cpu())
        self.audio_target.append(audio_slots[:, TARGET].cpu())

    def summary(self, interactive: bool, pairs_are_unique: bool, missing: Sequence[str] = ()) -> dict[str, Any]:
        groups = metrics.interactive_groups(self.ids, [*self.ids, *missing]) if interactive else None
        maps = {name: scores.summary(groups) for name, scores in self.maps.items()}
        maps["AUD"]["listening"] = maps["AUD"]["cIoU"] - maps["AUD_wrong"]["cIoU"]
        image, audio = torch.cat(self.image_target), torch.cat(self.audio_target)
        retrieval = {}
        if all(self.class_names) and not interactive:  # there a picture belongs to several classes
            retrieval["by_class"] = metrics.retrieval_recall(image, audio, self.class_names)
        if pairs_are_unique:
            retrieval["by_pair"] = metrics.retrieval_recall(image, audio)
        return {"maps": maps, "references": self.references.summary(groups), "retrieval": retrieval}

    def rows(self) -> list[dict[str, Any]]:
        confidence = F.cosine_similarity(torch.cat(self.image_target), torch.cat(self.audio_target))
        columns = {"id": self.ids, "class": self.class_names, "area": torch.cat(self.areas).tolist()}
        columns["confidence"] = confidence.tolist()
        for name, scores in self.maps.items():
            columns |= {
                f"{name}_{column}": values.tolist() for column, values in scores.columns().items() if column != "empty"
            }
        return [dict(zip(columns, values)) for values in zip(*columns.values())]


def score_maps(
    model: JointSlotModel,
    image: torch.Tensor,
    spectrogram: torch.Tensor,
    wrong: torch.Tensor,
    alpha: float,
    infer_sharpening: float,
    saliency: ObjectSaliency | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Every map of a batch by name, (B, 224, 224) in 0..1, and the slots of both modalities, (B, K, D)."""
    image_state, grid = model.attend_image(image)
    audio_state = model.attend_audio(spectrogram)
    own = model.maps(image_state, audio_state, grid, infer_sharpening)
    other = model.maps(image_state, model.attend_audio(wrong), grid, infer_sharpening)
    raw = {"AUD": own.audio_map, "AUD_wrong": other.audio_map, "IMG_QUERY": own.image_map}
    if saliency is not None:
        raw["OBJ_PRIOR"] = saliency(image)
    maps = {name: normalize_maps(upsample_maps(m)) for name, m in raw.items()}
    maps["IQR"] = fuse_maps(maps["AUD"], maps["IMG_QUERY"], alpha=alpha)
    if saliency is not None:
        maps["OGL"] = fuse_maps(maps["AUD"], None, maps["OBJ_PRIOR"], alpha)
        maps["IQR_OGL"] = fuse_maps(maps["AUD"], maps["IMG_QUERY"], maps["OBJ_PRIOR"], alpha)
    return maps, image_state.slots, audio_state.slots


@torch.no_grad()
def evaluate(
    model: JointSlotModel,
    dataset: EvaluationPairs,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 0,
    alpha: float = 0.6,
    infer_sharpening: float = 0.1,
    saliency: ObjectSaliency | None = None,
    interactive: bool = False,
    seed: int = 0,
    on_batch: Callable[[Sample, dict[str, torch.Tensor]], None] | None = None,
    max_batches: int | None = None,
) -> Evaluation:
    """Score every map of a test set in one pass, in fp32; weights, buffers and the model's mode stay as they were.

    on_batch sees each batch and its maps (to draw them); max_batches ends the pass early (dry runs).
    """
    was_training = model.training
    model.eval()
    scores, paired = SetScores(), WithWrongSound(dataset, seed)
    loader = make_loader(paired, batch_size, workers)
    total = min(len(loader), max_batches or len(loader))
    try:
        for number_of_batch, (batch, wrong) in enumerate(
            tqdm(loader, "evaluating", total, leave=False, unit="batch", disable=None)
        ):
            if number_of_batch == max_batches:
                break
            inputs = (x.to(device, non_blocking=True) for x in (batch.image, batch.spectrogram, wrong))
            with as_user_error(ValueError):  # maps that are not finite
                maps, image_slots, audio_slots = score_maps(model, *inputs, alpha, infer_sharpening, saliency)
            scores.add(batch, maps, image_slots, audio_slots)
            if on_batch:
                on_batch(batch, maps)
    finally:
        model.train(was_training)
    settings = {
        "alpha": alpha,
        "infer_sharpening": infer_sharpening,
        "threshold": metrics.THRESHOLD,
        "interpolation": "bicubic",
        "rules": {"cIoU": "fixed", "cIoU_half": "half"},
        "seed": seed,
    }
    unique = not interactive and len({pair.audio for pair in dataset.pairs}) == len(dataset)
    with as_user_error(ValueError):  # embeddings that are not finite
        results = scores.summary(interactive, unique, dataset.missing)
    results |= {"settings": settings, "wrong_sounds_of_same_class": paired.partners.same_label}
    return Evaluation(results, scores.rows())


@torch.no_grad()
def embed_set(model: JointSlotModel, loader: DataLoader, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Target slots (N, D) of the pictures and of the sounds of a loader, in evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        slots = [model.embed(batch.image.to(device), batch.spectrogram.to(device)) for batch in loader]
    finally:
        model.train(was_training)
    return tuple(torch.cat([s[side][:, TARGET].cpu() for s in slots]) for side in (0, 1))


class Drawer:
    """Draws while a set is scored: a contact sheet of some samples spread over it, an overlay of each if wanted.

    Nothing stands in its place before `finish`: a run that breaks off leaves no half set of pictures.
    """

    def __init__(self, sheet: Path, testset: str, count: int, overlays: Path | None = None) -> None:
        self.sheet, self.testset, self.overlays, self.seen, self.panels = sheet, testset, overlays, 0, []
        self.drafts = tempfile.TemporaryDirectory()
        self.on_sheet = {round(i * (count - 1) / (SHEET_SAMPLES - 1)) for i in range(SHEET_SAMPLES)}

    def __call__(self, batch: Sample, maps: dict[str, torch.Tensor]) -> None:
        for i, name in enumerate(batch.id):
            if self.overlays or self.seen in self.on_sheet:
                drawn = {m: maps[m][i].cpu().numpy() for m in DRAWN_MAPS}
                picture = denormalize(upsample_picture(batch.image[i]), IMAGENET_MEAN, IMAGENET_STD)
                panel = sample_panel(picture, batch.truth[i].numpy(), drawn, f"{name}   {batch.class_name[i]}".strip())
                if self.overlays:
                    contact_sheet([panel], Path(self.drafts.name) / f"{name}.png")
                if self.seen in self.on_sheet:
                    self.panels.append(panel)
            self.seen += 1

    def finish(self) -> Path:
        header = f"{self.testset}: {len(self.panels)} of {self.seen} samples, outline = ground truth"
        contact_sheet(self.panels, self.sheet, header)
        if self.overlays:
            shutil.rmtree(self.overlays, ignore_errors=True)
            shutil.copytree(self.drafts.name, self.overlays)
        self.drafts.cleanup()
        return self.sheet


def upsample_picture(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (3, 224, 224), the size of maps and ground truth."""
    return F.interpolate(image[None], (metrics.MAP_SIZE,) * 2, mode="bicubic")[0]


def checkpoint_path(args) -> Path:
    """--checkpoint best or latest of the experiment, or a path of its own."""
    if args.checkpoint not in ("best", "latest"):
        return Path(args.checkpoint)
    if not args.experiment_name:
        raise UserError("say which model: --experiment_name NAME, or --checkpoint PATH")
    return Path(args.model_dir) / args.experiment_name / f"{args.checkpoint}.pth"


def training_overlap(path: Path, ids: list[str]) -> int | None:
    """How many test ids the model was trained on; None where the list of training ids is not beside the checkpoint."""
    beside = path.with_name("train_ids.txt")
    return len(set(read_ids(beside)) & set(ids)) if beside.is_file() else None


def trained_with(state: dict[str, Any]) -> dict[str, Any]:
    """The flags of the training run, where a checkpoint carries them; released ones do not."""
    args = state.get("args")
    return args if isinstance(args, dict) else {}


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Where the weights come from and how they were chosen, as far as the checkpoint says."""
    state = load_checkpoint(path)
    chosen = "last epoch trained" if path.name == "latest.pth" else state.get("selected_by", "unknown")
    epoch, trainset = state.get("epoch", "unknown"), trained_with(state).get("trainset", "unknown")
    return {"path": str(path), "epoch": epoch, "selected_by": chosen, "trained_on": trainset}


def publish(evaluation: Evaluation, name: str, selection: Selection, checkpoint: Path, folder: Path) -> None:
    """Add to a set's figures where they come from, write results.json and per_sample.csv, print the table."""
    ids = [row["id"] for row in evaluation.rows]
    evaluation.results.update(
        testset=name,
        pairs={
            "scored": len(ids),
            "expected": selection.expected,
            "left_out": selection.missing,
            "left_out_because": "picture, sound or mask not found" if selection.missing else "",
        },
        checkpoint=describe_checkpoint(checkpoint),
        training_test_overlap=training_overlap(checkpoint, ids),
        provenance=provenance(),
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, evaluation.rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(evaluation.rows)
    write_text(folder / "per_sample.csv", text.getvalue())
    write_json(folder / "results.json", evaluation.results)
    print(results_table(evaluation.results))
    print(f"written: {folder / 'results.json'}, {folder / 'per_sample.csv'}\n")


def load_saliency(source: str, device: torch.device) -> ObjectSaliency | None:
    """The object prior; None when it was not asked for, or when "auto" could not download it, which is said."""
    if source == "none":
        return None
    try:
        return ObjectSaliency(source).to(device)
    except ValueError as error:
        if source != "auto":
            raise UserError(str(error)) from error
        print(f"OBJ_PRIOR, OGL and IQR_OGL are left out: {error}")
        return None


def parse_testsets(text: str) -> list[str]:
    names = list(ALL_SETS) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in ALL_SETS]
    if unknown:
        raise UserError(
            f"unknown test set {', '.join(unknown)}: choose from {', '.join(ALL_SETS)}, a comma list, or all"
        )
    return names


def build_test_sets(args, model: JointSlotModel) -> dict[str, tuple[EvaluationPairs, Selection]]:
    """The sets that --testset names; for `all` those whose data are there, the others named with the reason."""
    built = {}
    for name in parse_testsets(args.testset):
        try:
            built[name] = _build_test_set(name, args, model.shape["image_size"], model.shape["audio_seconds"])
        except UserError as error:
            if args.testset != "all":
                raise
            print(f"left out: {name} ({error})")
    if not built:
        raise UserError("--testset all: the data of no test set are there")
    return built


def _build_test_set(name: str, args, image_size: int, audio_seconds: float) -> tuple[EvaluationPairs, Selection]:
    sizes, rest = (image_size, audio_seconds), (args.test_list, args.allow_missing)
    if name in AVS_SETS and args.test_gt_path and args.testset == name:
        raise UserError(f"--test_gt_path does not apply to {name}: its masks lie below the data's root")
    if name in AVS_SETS:
        return build_avs_set(name, args.test_data_path, args.metadata, *sizes, *rest)
    return build_test_set(name, args.test_data_path, args.test_gt_path, args.metadata, *sizes, *rest)


def parse_args():
    parser = ArgumentParser(description="Score a trained model on test sets, and draw what it finds.")
    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", default="./checkpoints", help="folder of experiments")
    group.add_argument("--experiment_name", help="experiment below --model_dir")
    group.add_argument("--checkpoint", default="best", help="best, latest, or the path of a checkpoint")
    group.add_argument(
        "--imagenet_weights", default="auto", help="for OBJ_PRIOR and OGL: auto (download), none, or a file"
    )
    group = parser.add_argument_group("data")
    add_test_set_flags(group, default="synthetic")
    group.add_argument("--num_workers", type=number(int, low=0), default=2, help="loader processes")
    group = parser.add_argument_group("maps")
    group.add_argument("--alpha", type=number(float, low=0, high=1), default=0.6, help="weight of AUD in IQR and OGL")
    group.add_argument(
        "--infer_sharpening",
        type=number(float, above=0),
        help="multiplies the attention logits (default: what the model was trained with, else the paper's 0.1)",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--gpu", default="0", help="number of a CUDA device, or cpu")
    group.add_argument("--batch_size", type=number(int, low=1), default=64, help="changes speed and memory only")
    group.add_argument(
        "--seed", type=number(int, low=0, high=2**32 - 1), default=0, help="of the wrong sounds of AUD_wrong"
    )
    group.add_argument("--out_dir", help="default: NAME/results/, or PATH_results/ for --checkpoint PATH")
    group.add_argument("--save_visualizations", type=boolean, default=False, help="true: overlays and a contact sheet")
    return parser.parse_args()


def add_test_set_flags(group, default: str | None) -> None:
    """The flags that name test sets, the same in testing and training."""
    group.add_argument("--testset", default=default, help=f"{', '.join(ALL_SETS)}, a comma list, or all")
    group.add_argument("--test_data_path", help="root of the test data (default: the set's environment variable)")
    group.add_argument("--test_gt_path", help="annotation: a JSON of boxes, for flickr the folder of XML files")
    group.add_argument("--test_list", help="list of ids in the place of the set's own")
    group.add_argument("--metadata", default="./metadata", help="folder of the public lists and annotations")
    group.add_argument(
        "--allow_missing", type=boolean, default=False, help="true: go on without missing pairs, counted"
    )


def main() -> None:
    args = parse_args()
    device = pick_device(args.gpu)
    path = checkpoint_path(args)
    model = JointSlotModel.from_checkpoint(path, device)
    test_sets = build_test_sets(args, model)
    saliency = load_saliency(args.imagenet_weights, device)
    infer_sharpening = args.infer_sharpening or trained_with(load_checkpoint(path)).get("infer_sharpening", 0.1)
    beside = path.parent / ("results" if args.experiment_name else f"{path.stem}_results")
    out_dir = Path(args.out_dir) if args.out_dir else beside
    out_dir.mkdir(parents=True, exist_ok=True)  # before the work: a place that cannot be written to shows now
    for name, (dataset, selection) in test_sets.items():
        folder, drawer = out_dir / name, None
        if args.save_visualizations:
            drawer = Drawer(folder / "contact_sheet.png", name, len(dataset), folder / "samples")
        evaluation = evaluate(
            model,
            dataset,
            device,
            batch_size=args.batch_size,
            workers=args.num_workers,
            alpha=args.alpha,
            infer_sharpening=infer_sharpening,
            saliency=saliency,
            interactive=name in INTERACTIVE_SETS,
            seed=args.seed,
            on_batch=drawer,
        )
        publish(evaluation, name, selection, path, folder)
        if drawer:
            print(f"pictures: {drawer.finish()}, {folder / 'samples'}\n")


if __name__ == "__main__":
    run_cli(main)
