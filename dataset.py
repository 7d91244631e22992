"""VGG-Sound, Flickr-SoundNet, the built-in synthetic data and the user's own pairs: lists, annotations, transforms.

An id names one pair. H x W picture, F bins, L frames; ground truth is a (224, 224) map in 0..1.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_tensor

from annotations import GroundTruth, box_map, consensus_map, first_ids, load_boxes, read_ids
from audio_io import AUDIO_SUFFIXES, load_spectrogram
from utils import UserError, as_user_error

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPECTROGRAM_MASK_BINS = 9


class Sample(NamedTuple):
    """One item of every data set."""

    image: torch.Tensor  # (3, H, W) float32, ImageNet-normalised
    spectrogram: torch.Tensor  # (1, F, L) float32, log power / 12
    truth: torch.Tensor  # (224, 224) float32 in 0..1; empty (0,) in training
    id: str
    class_name: str  # empty where unknown


class Pair(NamedTuple):
    id: str
    image: Path
    audio: Path


class SetRow(NamedTuple):
    """Where a set's pairs, ids and annotations come from."""

    layout: str  # key of LAYOUTS
    root: str  # environment variable of the data's root, or the built-in data's folder
    ids: str | None = None  # list of ids; None: every id of the annotation, or every pair found
    annotation: str | None = None  # its file or folder, where it is not given on the command line
    expected: int | None = None  # published number of pairs
    val_ids: str | None = None  # list of held-out training ids
    lists_in_root: bool = False  # lists and annotation lie in the data's root, not in metadata/
    interactive: bool = False  # entries of one picture share the id up to the last underscore


LAYOUTS = {  # pairs of folders (pictures, sounds): all that exist below the root are searched
    "vggsound": (("frames", "audio"),),
    "flickr": (("frames", "audio"), ("Data", "Data")),
}

TRAIN_SETS = {
    "vggss_10k": SetRow("vggsound", "VGGSOUND_ROOT", "vggss_10k.txt", expected=10_000),
    "vggss_144k": SetRow("vggsound", "VGGSOUND_ROOT", "vggss_144k.txt", expected=144_000),
    "vggss_heard": SetRow("vggsound", "VGGSOUND_ROOT", "vggss_heard.txt", expected=59_468),
    "flickr_10k": SetRow("flickr", "FLICKR_ROOT", "flickr_10k.txt", expected=10_000),
    "flickr_144k": SetRow("flickr", "FLICKR_ROOT", "flickr_144k.txt", expected=144_000),
    "synthetic": SetRow("vggsound", "data/synthetic", "train.txt", val_ids="val.txt", lists_in_root=True),
    "custom": SetRow("vggsound", "CUSTOM_ROOT"),
}

TEST_SETS = {
    "vggss": SetRow("vggsound", "VGGSOUND_ROOT", None, "vggss.json", 5_158),
    "vggss_heard": SetRow("vggsound", "VGGSOUND_ROOT", "vggss_heard_test.csv", "vggss.json", 2_564),
    "vggss_unheard": SetRow("vggsound", "VGGSOUND_ROOT", "vggss_unheard_test.csv", "vggss.json", 2_575),
    "flickr": SetRow("flickr", "FLICKR_ROOT", "flickr_test.csv", "Annotations", 250),
    "synthetic": SetRow("vggsound", "data/synthetic", "test.txt", "test.json", lists_in_root=True),
    "synthetic_distractor": SetRow(
        "vggsound", "data/synthetic", "distractor.txt", "distractor.json", lists_in_root=True
    ),
    "synthetic_interactive": SetRow(
        "vggsound", "data/synthetic", "interactive.txt", "interactive.json", lists_in_root=True, interactive=True
    ),
    "custom": SetRow("vggsound", "CUSTOM_ROOT"),
}


# ---------------------------------------------------------------- ids and files


def index_folder(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """One directory walk: {id: file}; where an id has several files, the first suffix in order wins."""
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in suffixes:
                continue
            known = found.get(stem)
            if known is None or suffixes.index(suffix.lower()) < suffixes.index(known.suffix.lower()):
                found[stem] = folder / entry.name
    return found


def data_root(row: SetRow, given: str | Path | None, flag: str) -> Path:
    """The root given by the flag, else that of the row. Raises UserError when there is none."""
    if not given and row.root.endswith("_ROOT"):
        given = os.environ.get(row.root)
        if not given:
            raise UserError(f"where are the data? Give their root as {flag}, or set {row.root}=/path/to/data/")
    root = Path(given or row.root)
    if not root.is_dir():
        mend = f"set {row.root}" if row.root.endswith("_ROOT") else "python synthetic.py makes it"
        raise UserError(f"the data folder {root} does not exist: {mend}, or give another as {flag}")
    return root


def find_pairs(
    root: Path, layout: str, ids: Sequence[str] | None, allow_missing: bool = False
) -> tuple[list[Pair], list[str]]:
    """Pairs of `ids` (None: every id with a picture or a sound) below root, and the ids that lack one of them.

    Raises UserError when the folders are not there, nothing is found or, unless allow_missing, any is missing.
    """
    wanted = " or ".join(f"{frames}/ and {audio}/" for frames, audio in LAYOUTS[layout])
    present = [pair for pair in LAYOUTS[layout] if all((root / folder).is_dir() for folder in pair)]
    if not present:
        raise UserError(f"{root} has no folders {wanted}")
    images: dict[str, Path] = {}
    sounds: dict[str, Path] = {}
    for frames, audio in reversed(present):  # the first layout wins
        images |= index_folder(root / frames, IMAGE_SUFFIXES)
        sounds |= index_folder(root / audio, AUDIO_SUFFIXES)
    if ids is None:
        ids = sorted(images.keys() | sounds.keys())
    pairs = [Pair(i, images[i], sounds[i]) for i in ids if i in images and i in sounds]
    missing = [i for i in ids if i not in images or i not in sounds]
    if missing and not allow_missing:
        raise UserError(
            f"{len(missing)} of {len(ids)} pairs lack a picture or a sound in {wanted} below {root}: "
            f"{first_ids(missing)} (--allow_missing true goes on without them and counts them)"
        )
    if not pairs:
        raise UserError(f"no pair of picture and sound was found in {wanted} below {root}")
    return pairs, missing


# ---------------------------------------------------------------- transforms


def train_transform(size: int, augment: str) -> Callable[[Image.Image], torch.Tensor]:
    """PIL picture -> (3, size, size) normalised. augment: "hard" (the paper's) or "plain" (crop and flip)."""
    crop = [v2.Resize(int(size * 1.1), InterpolationMode.BICUBIC), v2.RandomCrop(size)]
    if augment == "hard":
        crop.append(v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.8))
    crop.append(v2.RandomHorizontalFlip())
    if augment == "hard":
        crop.append(v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8))
        crop.append(v2.RandomGrayscale(0.2))
    return v2.Compose([*crop, *_to_normalised()])


def eval_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """PIL picture -> (3, size, size) normalised: bicubic, antialiased, the aspect ratio is not kept."""
    return v2.Compose([v2.Resize((size, size), InterpolationMode.BICUBIC), *_to_normalised()])


def _to_normalised() -> list[Callable]:
    return [to_tensor, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]  # v2's own scaling differs in the last bit


def mask_spectrogram(spectrogram: torch.Tensor) -> torch.Tensor:
    """Set one random band of bins and one of frames of (1, F, L), 0 to 9 wide each, to 0 in place."""
    for axis in (1, 2):
        width = int(torch.randint(SPECTROGRAM_MASK_BINS + 1, ()))
        width = min(width, spectrogram.shape[axis])
        start = int(torch.randint(spectrogram.shape[axis] - width + 1, ()))
        spectrogram.narrow(axis, start, width).zero_()
    return spectrogram


def load_image(path: str | Path) -> Image.Image:
    """RGB picture. Raises ValueError, naming the file, when it cannot be decoded."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the picture {path}: {error}") from error


# ---------------------------------------------------------------- data sets


class TrainingPairs(Dataset):
    """Augmented pairs. What is drawn depends on (seed, epoch, index) alone, not on workers or order.

    augment: "hard", "plain" or "none" (held-out pairs: as in evaluation).
    """

    def __init__(
        self, pairs: Sequence[Pair], image_size: int, audio_seconds: float, augment: str = "hard", seed: int = 0
    ) -> None:
        self.pairs, self.audio_seconds, self.augment, self.seed, self.epoch = pairs, audio_seconds, augment, seed, 0
        self.transform = eval_transform(image_size) if augment == "none" else train_transform(image_size, augment)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        draw = int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]), as_user_error(ValueError):
            torch.default_generator.manual_seed(draw)  # torch.manual_seed would reseed CUDA as well
            position = 0.5 if self.augment == "none" else 0.4 + 0.2 * float(torch.rand(()))
            spectrogram = load_spectrogram(pair.audio, self.audio_seconds, position)
            if self.augment == "hard":
                spectrogram = mask_spectrogram(spectrogram)
            return Sample(self.transform(load_image(pair.image)), spectrogram, torch.empty(0), pair.id, "")


class EvaluationPairs(Dataset):
    """Pairs with their ground truth; missing: ids that the set should hold, too."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        ground_truth: GroundTruth,
        missing: Sequence[str],
        image_size: int,
        audio_seconds: float,
    ) -> None:
        self.pairs, self.ground_truth, self.missing, self.audio_seconds = pairs, ground_truth, missing, audio_seconds
        self.class_names = [ground_truth.class_of.get(pair.id, "") for pair in pairs]
        self.transform = eval_transform(image_size)

    def __len__(self) -> int:
        return len(self.pairs)

    def spectrogram(self, index: int) -> torch.Tensor:
        with as_user_error(ValueError):
            return load_spectrogram(self.pairs[index].audio, self.audio_seconds)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        with as_user_error(ValueError):
            image = self.transform(load_image(pair.image))
        truth = self.ground_truth.truth_of(pair.id)
        return Sample(image, self.spectrogram(index), truth, pair.id, self.class_names[index])


class Selection(NamedTuple):
    """The pairs of a training set and what is not there."""

    pairs: list[Pair]
    missing: list[str]
    expected: int  # pairs that the set should hold


def select_training_pairs(
    name: str, root: str | None, metadata: str, train_list: str | None = None, allow_missing: bool = False
) -> Selection:
    """Pairs of a row of TRAIN_SETS; train_list replaces the row's own list."""
    row = TRAIN_SETS[name]
    folder = data_root(row, root, "--train_data_path")
    path = train_list or _own_list(row, row.ids, folder, metadata)
    pairs, missing = find_pairs(folder, row.layout, read_ids(path) if path else None, allow_missing)
    listed = len(pairs) + len(missing)
    return Selection(pairs, missing, listed if train_list else max(listed, row.expected or 0))


def hold_out(
    name: str,
    pairs: list[Pair],
    root: str | None,
    val_list: str | None,
    val_fraction: float,
    seed: int,
    allow_missing: bool = False,
) -> tuple[list[Pair], list[Pair]]:
    """Split into pairs to train on and pairs held out for choosing the best checkpoint, which needs no boxes.

    Held out are the ids of val_list, else of the row's own list, else a seeded fraction.
    """
    row = TRAIN_SETS[name]
    path = val_list or _own_list(row, row.val_ids, data_root(row, root, "--train_data_path"), "")
    if path:
        held_out, _ = find_pairs(data_root(row, root, "--train_data_path"), row.layout, read_ids(path), allow_missing)
    else:
        order = np.random.default_rng(seed).permutation(len(pairs))
        held_out = [pairs[i] for i in sorted(order[: round(val_fraction * len(order))])]
    held_ids = {pair.id for pair in held_out}
    return [pair for pair in pairs if pair.id not in held_ids], held_out


def _own_list(row: SetRow, name: str | None, root: Path, metadata: str) -> Path | None:
    return None if name is None else (root if row.lists_in_root else Path(metadata)) / name


def build_ground_truth(
    name: str, root: str | None, gt_path: str | None, metadata: str, test_list: str | None = None
) -> GroundTruth:
    """What a row of TEST_SETS asks for, whether its pictures and sounds are there or not.

    test_list replaces the row's own list.
    """
    row = TEST_SETS[name]
    if gt_path is None and row.annotation is None:
        raise UserError(f"--testset {name} needs --test_gt_path: a JSON of {{file, class, bbox}}")
    in_root = row.lists_in_root or row.layout == "flickr"
    needs_root = (in_root and not gt_path) or (row.lists_in_root and not test_list)
    folder = data_root(row, root, "--test_data_path") if needs_root else Path()
    annotation = Path(gt_path) if gt_path else (folder if in_root else Path(metadata)) / row.annotation
    list_path = test_list or _own_list(row, row.ids, folder, metadata)
    if row.layout == "flickr":
        if not annotation.is_dir():
            raise UserError(f"the folder of annotations {annotation} does not exist: give it as --test_gt_path")
        ids = read_ids(list_path)
        truth = {"truth_of": partial(_xml_truth, annotation)}
    else:
        boxes = load_boxes(annotation)
        ids = read_ids(list_path) if list_path else list(boxes)
        unknown = [i for i in ids if i not in boxes]
        if unknown:
            raise UserError(f"{annotation} has no box for {len(unknown)} ids of {list_path}: {first_ids(unknown)}")
        truth = {
            "truth_of": partial(_box_truth, boxes),
            "class_of": {i: boxes[i][0] for i in ids},
            "silent": frozenset(i for i in ids if not boxes[i][1]),
        }
    if row.interactive:
        truth["unit_of"] = {i: i.rpartition("_")[0] for i in ids}
    expected = len(ids) if test_list else max(len(ids), row.expected or 0)
    return GroundTruth(name, ids, expected=expected, interactive=row.interactive, **truth)


def build_test_set(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    image_size: int,
    audio_seconds: float,
    test_list: str | None = None,
    allow_missing: bool = False,
) -> EvaluationPairs:
    """A row of TEST_SETS with its pictures, sounds and ground truth; test_list replaces the row's own list."""
    row = TEST_SETS[name]
    folder = data_root(row, root, "--test_data_path")
    ground_truth = build_ground_truth(name, root, gt_path, metadata, test_list)
    pairs, missing = find_pairs(folder, row.layout, ground_truth.ids, allow_missing)
    return EvaluationPairs(pairs, ground_truth, missing, image_size, audio_seconds)


def _box_truth(boxes: dict[str, tuple[str, list[list[float]]]], name: str) -> torch.Tensor:
    return box_map(boxes[name][1])


def _xml_truth(folder: Path, name: str) -> torch.Tensor:
    return consensus_map(folder / f"{name}.xml")


def make_loader(
    dataset: Dataset, batch_size: int, workers: int, shuffle_seed: int | None = None, drop_last: bool = False
) -> DataLoader:
    """Batches in order, or shuffled by a seed. Workers draw nothing of their own: see TrainingPairs."""
    shuffle = shuffle_seed is not None
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=workers,
        generator=torch.Generator().manual_seed(shuffle_seed if shuffle else 0),
        pin_memory=torch.cuda.is_available(),
    )
