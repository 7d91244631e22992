"""How far one gets on the synthetic set without learning anything, from its files.

Three pointers that do not hear: the middle of the image, a random place, the most contrasted place. An oracle that
sees where the objects are but does not hear. The class by the nearest mean colour or mean spectrum. And whether the
source is in view, by what is seen or by what is heard alone.
N maps or entries, H x W pixels of an image, F bins.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.metrics import average_precision_score
from tqdm import tqdm

from annotations import box_map, load_boxes
from audio_io import load_audio, log_spectrogram
from maps import MAP_SIZE, normalize_maps
from scoring.metrics import consensus_iou, pointing, region_fixed, success
from scoring.summary import Groups, interactive_groups, worst_by_image
from synthetic.kinds import KINDS
from transforms import load_image
from utils import UserError, as_user_error

BATCH = 16  # maps scored at once: more would leave the processor's cache
PRESENCE_CUES = {
    "objects": "the number of objects in view",
    "saliency": "the highest contrast in view",
    "loudness": "the level of the sound",
    "peaks": "how uneven the spectrogram is",
    "ear": "telling any kind from silence and noise",
}
Boxes = list[list[float]]  # [xmin, ymin, xmax, ymax] in 0..1, of one entry


# ---------------------------------------------------------------- where is it?


def blob(x: float, y: float) -> np.ndarray:
    """Gaussian map (MAP_SIZE, MAP_SIZE) centred on x, y in 0..1, with a standard deviation of a quarter of the side."""
    axis = (np.arange(MAP_SIZE) + 0.5) / MAP_SIZE
    return np.exp(-8 * (axis[None, :] - x) ** 2 - 8 * (axis[:, None] - y) ** 2)


def contrast_saliency(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) -> map (MAP_SIZE, MAP_SIZE): the local standard deviation of the colour.

    The strongest of several: the distance from the image's mean colour or mean chroma points right less often.
    """
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    mean, mean_square = (cv2.GaussianBlur(power, (0, 0), len(image) / 16) for power in (lab, lab**2))
    return cv2.resize((mean_square - mean**2).clip(min=0).sum(2) ** 0.5, (MAP_SIZE, MAP_SIZE))


def score_maps(maps: Iterable[np.ndarray], boxes: Sequence[Boxes], groups: Groups) -> dict[str, float]:
    """Scores of N maps (MAP_SIZE, MAP_SIZE) against the sounding boxes; groups: {image: its entries} or empty."""
    maps, ious, hits = iter(maps), [], []
    for start in range(0, len(boxes), BATCH):
        batch = normalize_maps(torch.from_numpy(np.stack(list(islice(maps, BATCH))).astype(np.float32)))
        truth = torch.stack([box_map(drawn) for drawn in boxes[start : start + BATCH]])
        ious.append(consensus_iou(region_fixed(batch), truth))
        hits.append(pointing(batch, truth))
    hits, localized = torch.cat(hits).numpy(), success(torch.cat(ious).numpy())
    scores = {"pointing": float(hits.mean()), "cIoU": float(localized.mean())}
    if groups:
        for name, values in {"both_pointing": hits, "IIoU": localized}.items():
            worst, first = worst_by_image(values, groups)
            scores[name] = float(worst[first].mean())
    return scores


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3). Raises UserError, naming the file, when it cannot be decoded."""
    with as_user_error(ValueError):
        return np.asarray(load_image(path))


def blind_scores(root: Path, split: str, objects: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Scores of everything that does not hear, on one split: {centre, random, saliency, oracle: {score: 0..1}}."""
    annotations = load_boxes(root / f"{split}.json")
    names, boxes = list(annotations), [drawn for _, drawn in annotations.values()]
    groups = interactive_groups(names) if split == "interactive" else {}
    places = np.random.default_rng(0).random((len(names), 2))
    images = (read_image(root / "frames" / f"{name}.jpg") for name in names)
    scores = {
        "centre": score_maps((blob(0.5, 0.5) for _ in names), boxes, groups),
        "random": score_maps((blob(x, y) for x, y in places), boxes, groups),
        "saliency": score_maps(map(contrast_saliency, images), boxes, groups),
    }
    return {**scores, "oracle": oracle_scores([objects[name] for name in names], groups)}


def oracle_scores(in_view: Sequence[list[dict]], groups: Groups) -> dict[str, float]:
    """Expected scores of taking one of the boxes in view at random: it sees every object and hears nothing.

    in_view: the objects of each entry. Boxes are disjoint: the IoU is 1 if the taken one sounds, and else 0.
    """
    shares = [sum(thing["sounding"] for thing in things) / len(things) for things in in_view]
    chance = torch.tensor(shares, dtype=torch.float64)
    scores = {"pointing": chance.mean().item(), "cIoU": chance.mean().item()}
    if groups:
        both = torch.stack([chance[group].prod() for group in groups.values()]).mean().item()
        scores |= {"both_pointing": both, "IIoU": both}
    return scores


# ---------------------------------------------------------------- what is it?


def nearest_mean_accuracy(root: Path, feature: Callable[[Path, str, Boxes], np.ndarray]) -> float:
    """Share of test entries whose feature(root, id, boxes) is nearest to the mean, over train, of their own class."""

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        annotations = load_boxes(root / f"{split}.json")
        features = [feature(root, name, boxes) for name, (_, boxes) in annotations.items()]
        return np.stack(features), np.array([kind for kind, _ in annotations.values()])

    (train, train_kinds), (test, test_kinds) = read("train"), read("test")
    kinds = np.unique(train_kinds)
    means = np.stack([train[train_kinds == kind].mean(0) for kind in kinds])
    nearest = np.linalg.norm(test[:, None] - means[None], axis=2).argmin(1)
    return float((kinds[nearest] == test_kinds).mean())


def mean_colour(root: Path, name: str, boxes: Boxes) -> np.ndarray:
    """Mean RGB colour (3,) of the middle of the sounding object: its box less a fifth on every side."""
    image = read_image(root / "frames" / f"{name}.jpg")
    height, width = image.shape[:2]
    left, top, right, bottom = np.array(boxes[0]) * (width, height, width, height)
    inset_x, inset_y = (right - left) / 5, (bottom - top) / 5
    middle = image[int(top + inset_y) : int(bottom - inset_y), int(left + inset_x) : int(right - inset_x)]
    return middle.mean((0, 1))


def mean_spectrum(root: Path, name: str, boxes: Boxes) -> np.ndarray:
    """Log power spectrum of the sound, averaged over time: (F,)."""
    return log_spectrogram(read_audio(root, name))[0].mean(1).numpy()


def read_audio(root: Path, name: str) -> np.ndarray:
    """Waveform (samples,) in -1..1. Raises UserError, naming the file, when it cannot be decoded."""
    with as_user_error(ValueError):
        return load_audio(root / "audio" / f"{name}.wav")


# ---------------------------------------------------------------- is its source in view?


def presence_scores(root: Path, objects: dict[str, list[dict]]) -> dict[str, float]:
    """Average precision of "the source is in view" on offscreen by cues of one sense: {cue: 0..1}; a half is chance.

    ear: tells any kind from silence and noise, and sees nothing; the others are measured on the files.
    """
    annotations = load_boxes(root / "offscreen.json")
    names = list(annotations)
    there = [bool(boxes) for _, boxes in annotations.values()]
    waveforms = [read_audio(root, name) for name in names]
    cues = {
        "objects": [len(objects[name]) for name in names],
        "saliency": [contrast_saliency(read_image(root / "frames" / f"{name}.jpg")).max() for name in names],
        "loudness": [np.std(waveform) for waveform in waveforms],
        "peaks": [log_spectrogram(waveform)[0].std().item() for waveform in waveforms],
        "ear": [heard in KINDS for heard, _ in annotations.values()],
    }
    return {cue: float(average_precision_score(there, values)) for cue, values in cues.items()}


# ---------------------------------------------------------------- all, for every split


def probe(root: str | Path) -> dict[str, dict]:
    """What is had without learning, from the files: {split: blind_scores, "class_accuracy": {"colour", "spectrum"}}.

    And "presence_AP": presence_scores. Raises UserError, naming the file, on one that is missing or cannot be read.
    """
    root = Path(root)
    path = root / "objects.json"
    try:
        objects = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, which names the objects in view: {error}") from error
    splits = dict.fromkeys(name.partition("_")[0] for name in objects)
    numbers = {
        split: blind_scores(root, split, objects) for split in tqdm(splits, "probing", leave=False, disable=None)
    }
    numbers["class_accuracy"] = {
        "colour": nearest_mean_accuracy(root, mean_colour),
        "spectrum": nearest_mean_accuracy(root, mean_spectrum),
    }
    if "offscreen" in splits:  # older sets have none
        numbers["presence_AP"] = presence_scores(root, objects)
    return numbers


def probe_table(numbers: dict[str, dict]) -> str:
    """The numbers of `probe` as a table, in percent."""
    columns = ("pointing", "cIoU", "both_pointing", "IIoU")
    lines = [f"{'split':<13}{'what points':<13}" + "".join(f"{column:>15}" for column in columns)]
    for split in (name for name in numbers if name not in ("class_accuracy", "presence_AP")):
        for pointer, scores in numbers[split].items():
            cells = [f"{100 * scores[column]:15.1f}" if column in scores else " " * 15 for column in columns]
            lines.append(f"{split:<13}{pointer:<13}{''.join(cells)}".rstrip())
    lines += ["", f"class of the nearest mean ({len(KINDS)} kinds), test set"]
    lines += [f"  by mean {feature}: {100 * accuracy:.1f}" for feature, accuracy in numbers["class_accuracy"].items()]
    if "presence_AP" in numbers:
        lines += ["", 'average precision of "the source is in view" by one cue (chance: 50), offscreen']
        lines += [f"  by {PRESENCE_CUES[cue]}: {100 * value:.1f}" for cue, value in numbers["presence_AP"].items()]
    return "\n".join(lines)
