"""Lists of ids, and ground truth: boxes, consensus of annotators, masks, each as a (224, 224) map in 0..1."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import ParseError

import numpy as np
import torch
from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException
from PIL import Image

from metrics import MAP_SIZE
from utils import UserError

FLICKR_BOX_UNITS = 256


class GroundTruth(NamedTuple):
    """What a test set asks for, without its pictures and sounds."""

    name: str
    ids: list[str]
    truth_of: Callable[[str], torch.Tensor]  # id -> (224, 224) map in 0..1
    expected: int  # pairs that the set should hold
    class_of: Mapping[str, str] = {}  # as far as known
    unit_of: Mapping[str, str] = {}  # image or video, where ids share one; else a sample stands for itself
    silent: frozenset[str] = frozenset()  # ids whose picture does not show the source: extended sets
    masks: bool = False  # G are masks: AVSBench's mIoU and F are defined
    interactive: bool = False  # entries of one picture share the id up to the last underscore


# ---------------------------------------------------------------- lists


def read_ids(path: str | Path) -> list[str]:
    """Ids of a list, one a line, the first field where a line has commas. Raises UserError when there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"the list {path} does not exist: metadata/README.md says where each list comes from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}: {error}") from error
    ids = [line.split(",")[0].strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"the list {path} is empty")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]
        raise UserError(f"the list {path} names {len(twice)} ids twice: {first_ids(twice)}")
    return ids


def first_ids(ids: Sequence[str], count: int = 5) -> str:
    return ", ".join(ids[:count]) + (f" and {len(ids) - count} more" if len(ids) > count else "")


# ---------------------------------------------------------------- annotations


def load_boxes(path: str | Path) -> dict[str, tuple[str, list[list[float]]]]:
    """VGG-SS JSON: {id: (class name, [[xmin, ymin, xmax, ymax], ...] in units of the picture)}."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"the annotation {path} does not exist: metadata/README.md says where each comes from"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the annotation {path}: {error}") from error
    boxes: dict[str, tuple[str, list[list[float]]]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        try:
            drawn = [[float(v) for v in box] for box in entry["bbox"]]
            name, class_name = str(entry["file"]), str(entry.get("class", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"entry {number} of {path} is not {{file, class, bbox}}: {entry!r:.80}") from error
        if any(len(box) != 4 or np.isnan(box).any() for box in drawn):
            raise UserError(f"{path}: a box of {name} is not four numbers")
        if name in boxes:
            raise UserError(f"{path}: {name} stands there twice")
        boxes[name] = (class_name, drawn)
    if not boxes:
        raise UserError(f"the annotation {path} holds no list of entries {{file, class, bbox}}")
    if not any(box_map(drawn).any() for _, drawn in boxes.values()):
        name, (_, drawn) = next(iter(boxes.items()))
        raise UserError(
            f"no box in {path} covers a pixel: [xmin, ymin, xmax, ymax] in 0..1 of the picture are wanted, "
            f"{name} has {drawn}"
        )
    return boxes


def box_map(boxes: Iterable[Sequence[float]]) -> torch.Tensor:
    """Boxes in 0..1 -> (224, 224) map, 1 inside any of them. Clipped to the picture, cut to whole pixels."""
    truth = torch.zeros(MAP_SIZE, MAP_SIZE)
    for box in boxes:
        xmin, ymin, xmax, ymax = (int(min(max(v, 0.0), 1.0) * MAP_SIZE) for v in box)
        truth[ymin:ymax, xmin:xmax] = 1
    return truth


def consensus_map(path: str | Path) -> torch.Tensor:
    """Flickr-SoundNet XML -> (224, 224) map: every annotator's box adds one half, at most 1 (Senocak et al., 2018)."""
    truth = torch.zeros(MAP_SIZE, MAP_SIZE)
    try:
        for box in ElementTree.parse(path).getroot().iterfind("./*/bbox"):
            scaled = [int(MAP_SIZE * float(side.text) / FLICKR_BOX_UNITS) for side in list(box)[1:]]
            xmin, ymin, xmax, ymax = (max(v, 0) for v in scaled)
            truth[ymin:ymax, xmin:xmax] += 0.5
    except FileNotFoundError:
        raise UserError(f"the annotation {path} does not exist: give its folder as --test_gt_path") from None
    except (ParseError, DefusedXmlException, TypeError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"cannot read the annotation {path}: {error}") from error
    return truth.clamp(max=1)


def mask_map(path: str | Path, threshold: int = 0) -> torch.Tensor:
    """Mask picture of mode 1, L or P -> (224, 224) map, 1 where a pixel is above threshold. Nearest neighbour."""
    with Image.open(path) as picture:
        if picture.mode not in ("1", "L", "P"):
            picture = picture.convert("L")
        resized = picture.resize((MAP_SIZE, MAP_SIZE), Image.Resampling.NEAREST)
        return torch.from_numpy((np.array(resized).astype(np.int32) > threshold).astype(np.float32))
