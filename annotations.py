"""Lists of ids, and ground truth: boxes, consensus of annotators, masks, each as a (224, 224) map in 0..1."""

import csv
import difflib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError

import numpy as np
import torch
from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException
from PIL import Image

import media
from maps import MAP_SIZE
from utils import Absent, UserError

FLICKR_BOX_UNITS = 256
JPEG_MASK_THRESHOLD = 127  # compression leaves no pixel exactly zero
IN_PIXELS = 2.0  # larger coordinates are not fractions of an image ...
HUGE = 1e6  # ... and beyond a million they are corrupt, like the -2.9e16 in vggss.json


class GroundTruth(NamedTuple):
    """What a test set asks for, without its images and audio."""

    name: str
    ids: list[str]
    truth_of: Callable[[str], torch.Tensor]  # id -> (224, 224) map in 0..1
    expected: int  # pairs that the set should hold
    class_of: Mapping[str, str] = {}  # as far as known
    unit_of: Mapping[str, str] = {}  # image or video, where ids share one; else a sample stands for itself
    silent: frozenset[str] = frozenset()  # ids whose image does not show the source: extended sets
    masks: bool = False  # G are masks: AVSBench's mIoU and F are defined
    interactive: bool = False  # images with several sources: the entries of one share a unit
    # id: names of its image and its audio, where these are not the id; of several side by side, or at once, all
    sources: Mapping[str, tuple[str | Sequence[str], str | Sequence[str]]] = {}
    siblings: Mapping[str, Sequence[str]] = {}  # id: ids of all sources of its image, in sets of several sources
    seen: Mapping[str, frozenset[str]] = {}  # id: classes in view, silent ones too, where they are more than its class
    heard: Mapping[str, frozenset[str]] = {}  # id: classes in its audio, where they are more than its class
    parts: Mapping[str, frozenset[str]] = {}  # part of the set that has figures of its own: its ids
    robust: bool = False  # AVSBench-Robust: masks, and always negative audio
    notes: Sequence[str] = ()  # what a reader of the figures should know


# ---------------------------------------------------------------- lists


def read_text(path: str | Path, what: str) -> str:
    """Text of a list or annotation (UTF-8, with or without a byte order mark). The UserError says what to do."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        path = Path(path)
        files = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [file.name for file in files if file.suffix == path.suffix], n=1)
        mend = f"`python prepare_data.py metadata --only {path.name}` fetches it if it is a public one"
        mend += " (see metadata/README.md)" + (f"; of a like name there is {path.parent / near[0]}" if near else "")
        raise Absent(f"the {what} {path.absolute()} does not exist: {mend}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from error


def read_ids(path: str | Path) -> list[str]:
    """Ids of a list, one per line as it stands; of a .csv the first column. Raises UserError when there are none."""
    text = read_text(path, "list")
    if str(path).lower().endswith(".csv"):
        try:
            names = [row[0] for row in csv.reader(text.splitlines()) if row]
        except csv.Error as error:
            raise UserError(f"cannot read the list {path}: {error}") from error
    else:
        names = text.splitlines()
    ids = [check_id(name, path) for name in names if name.strip()]
    if not ids:
        raise UserError(f"the list {path} is empty")
    if len(set(ids)) < len(ids):
        twice = repeated(ids)
        raise UserError(f"the list {path} names {len(twice)} ids twice: {first_ids(twice)}")
    return ids


def check_id(name: str, path: str | Path) -> str:
    """The id as it is compared, unless it could lead out of a folder: ids name files. Raises UserError."""
    name = as_id(name)
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(f"{path}: {name!r:.60} is not an id: give a plain file name without its suffix")
    return name


def as_id(name: str) -> str:
    """A name as ids are compared: Unicode composed (NFC; some file systems decompose), without outer white space."""
    return unicodedata.normalize("NFC", name).strip()


def hint(unknown: Sequence[str], known: Collection[str]) -> str:
    """What may be wrong with ids that are not among the known ones; empty where nothing comes to mind."""
    for name in unknown[:1000]:
        plain = name.strip("\"' ")
        for guess in (plain, PurePosixPath(plain).stem, plain.partition(",")[0].strip("\"' ")):
            if guess != name and guess in known:
                return (
                    f"; {name!r} is not there but {guess!r} is: ids are file names without their suffix, without "
                    "quotes, one per line"
                )
    return ""


def repeated(ids: Sequence[str]) -> list[str]:
    """Every mention of an id after its first one."""
    seen: set[str] = set()
    return [i for i in ids if i in seen or seen.add(i)]


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV with a header. Raises UserError when it cannot be read."""
    try:
        return list(csv.DictReader(read_text(path, "list").splitlines()))
    except csv.Error as error:
        raise UserError(f"cannot read the list {path}: {error}") from error


def read_silent_pairs(path: str | Path) -> dict[str, tuple[str, str]]:
    """SLAVC's list (video,audio,label) of pairs whose image does not show the source -> {id: (image, audio)}.

    The id is image+audio, because either name may also occur in other pairs.
    """
    rows = read_rows(path)
    if not rows or not {"video", "audio"} <= rows[0].keys():
        raise UserError(f"{path} has no rows of columns video, audio")
    named = [tuple(check_id((row[key] or "").strip(), path) for key in ("video", "audio")) for row in rows]
    pairs = {f"{video}+{audio}": (video, audio) for video, audio in named}
    if len(pairs) < len(named):
        twice = repeated([f"{video}+{audio}" for video, audio in named])
        raise UserError(f"{path} names {len(twice)} pairs twice: {first_ids(twice)}")
    return pairs


# ---------------------------------------------------------------- names of downloaders

CLIP_NAME = re.compile(  # an id of YouTube is 11 of A-Z a-z 0-9 _ -; what stands around it comes from downloaders
    r"[vY]?(?P<video>[\w-]{11})_(?P<start>\d+(?:\.\d+)?)(?:_(?P<end>\d+(?:\.\d+)?))?(?:_out)?", re.ASCII
)
LATEST_START = 43_200  # seconds: YouTube's videos last 12 h at most
CLIP_SECONDS = 10  # of VGG-Sound's and AudioSet's clips


def readings(stem: str) -> dict[str, bool]:
    """Ids `<youtube id>_<start second, 6 digits>` that a name can mean, and whether its form leaves no doubt.

    A number may be in seconds or in milliseconds. No doubt: the name is such an id, or start and end are 10 s apart.
    """
    found = CLIP_NAME.fullmatch(stem)
    if not found:
        return {}
    start = float(found["start"])
    length = float(found["end"]) - start if found["end"] else None
    ids = {}
    for unit in (1, 1000):
        second = start / unit
        if not second.is_integer() or second > LATEST_START or (length is not None and not 0 < length / unit <= 60):
            continue
        name = f"{found['video']}_{int(second):06d}"
        sure = name == stem or (length is not None and abs(length / unit - CLIP_SECONDS) < 0.001)
        ids[name] = ids.get(name, False) or sure
    return ids


def clip_id(stem: str, listed: Collection[str] = ()) -> tuple[str, str]:
    """The id of a clip's name, and "" (it is its own id, or a sure reading), "other" or "ambiguous" (its own name).

    listed: known ids; one of them decides what a name means. Without them, only a form that leaves no doubt does.
    """
    stem = as_id(stem)
    ids = readings(stem)
    if stem in listed or stem in ids:
        return stem, ""
    for chosen in ([name for name in ids if name in listed], [name for name, sure in ids.items() if sure]):
        if len(chosen) == 1:
            return chosen[0], ""
    return stem, "ambiguous" if ids else "other"


def check_finite(ids: Sequence[str], values: Mapping[str, torch.Tensor]) -> None:
    """ValueError, with the id, where what is computed of samples, {what: (N, ...)}, holds a NaN or an infinity."""
    for what, of_samples in values.items():
        if not torch.isfinite(of_samples).all():
            bad = ~torch.isfinite(of_samples).flatten(1).all(1)
            raise ValueError(f"the {what} of {ids[int(bad.nonzero()[0])]} holds a value that is not finite")


# ---------------------------------------------------------------- files by id

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # the first of them wins where an id has several files
MORE_IMAGES = (".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm", ".jfif")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".npy")
MORE_AUDIO = (".m4a", ".aac", ".opus", ".oga", ".aiff", ".aif", ".wma", ".mp2", ".ac3", ".au", ".caf", ".amr", ".mka")
FILM_SUFFIXES = (
    ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mts", ".m2ts", ".ts", ".3gp", ".3g2", ".flv", ".wmv", ".asf",
    ".mpg", ".mpeg", ".vob", ".ogv", ".mxf", ".f4v", ".mod", ".tod", ".dv", ".rm", ".rmvb", ".divx",
)  # fmt: skip
SUFFIXES = {"image": IMAGE_SUFFIXES + MORE_IMAGES, "audio": AUDIO_SUFFIXES + MORE_AUDIO + FILM_SUFFIXES}


def index_folder(folder: Path, kind: str) -> tuple[dict[str, str], list[str]]:
    """One directory walk: {id: path of its file, or of its folder of frames}, and the names of all other entries.

    kind: "image" or "audio". What has another suffix is looked into. Hidden entries are left out: half-written files
    begin with a dot. Paths are plain strings: of hundreds of thousands, `Path` objects would take several times the
    memory.
    """
    order, known_suffixes = {suffix: n for n, suffix in enumerate(SUFFIXES[kind])}, {*sum(SUFFIXES.values(), ())}
    found, others = {}, []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if kind == "image" and any(os.path.splitext(name)[1].lower() in order for name in os.listdir(entry)):
                    found.setdefault(as_id(entry.name), entry.path)
            elif UNWRITABLE.search(entry.name) or (
                suffix.lower() not in order and (suffix.lower() in known_suffixes or not holds(entry.path, kind))
            ):
                others.append(entry.name)
            else:
                known = os.path.splitext(found.get(as_id(stem), ""))[1].lower()
                if not known or order.get(suffix.lower(), 99) < order.get(known, 99):
                    found[as_id(stem)] = entry.path
    return found, others


UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")  # would break a list of one id per line


def holds(path: str, kind: str) -> bool:
    """Whether a file is an image, or holds sound, whatever its name."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if not head or (head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head)):
            return False  # text: such files lie beside data by the thousand
        if kind == "image":
            return media.is_image(path)
        with media.open(path) as opened:
            return opened.has_sound
    except (OSError, UserError):
        return False


def frames_in(path: str) -> list[str]:
    """The images of a folder of frames, in the order of the numbers in their names."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    names = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES["image"]]
    number = re.compile(r"\d+")
    names.sort(key=lambda name: ([int(n) for n in number.findall(name)], name))
    return [os.path.join(path, name) for name in names]


def middle_frame(path: str) -> str:
    """The image file itself; of a folder of frames the middle one, or VGG-SS's own, number 50 at 10 per second."""
    if not os.path.isdir(path):
        return path
    frames = frames_in(path)
    if not frames:
        raise ValueError(f"the folder of frames {path} is empty")
    return next((frame for frame in frames if "image_050." in frame), frames[(len(frames) - 1) // 2])


def own_name(name: str) -> str:
    """The id that a file's name without suffix means by its form alone, as releases and downloaders name files."""
    stem, suffix = os.path.splitext(name)
    return clip_id(stem if suffix.lower() in FILM_SUFFIXES else name)[0]


def other_names(files: Mapping[str, str]) -> dict[str, str]:
    """{id: path} of all that names of files may mean beside themselves; what two of them may mean is left out."""
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        stem, suffix = os.path.splitext(name)
        plain = stem if suffix.lower() in FILM_SUFFIXES else name
        for meant in {plain, *readings(plain)} - {name}:
            found.setdefault(meant, set()).add(path)
    return {meant: min(paths) for meant, paths in found.items() if len(paths) == 1 and meant not in files}


def first_ids(ids: Sequence[str], count: int = 5) -> str:
    return ", ".join(ids[:count]) + (f" and {len(ids) - count} more" if len(ids) > count else "")


# ---------------------------------------------------------------- annotations


class Named(NamedTuple):
    """What an entry of a JSON of boxes is of."""

    id: str
    image: str
    audio: str


def names_of(entry: Mapping[str, Any], path: str | Path) -> Named:
    """An entry's id, and the names of its image and audio where `image` and `audio` tell them from `file`.

    Without `file`, or where `audio` alone stands beside it, the id is image+audio, as one image may have many entries.
    """
    given = {
        kind: check_id(_without_suffix(str(entry[kind]), kind), path) for kind in ("image", "audio") if kind in entry
    }
    file = check_id(str(entry["file"]), path) if "file" in entry or not given else None
    image = given.get("image") or file or given["audio"]
    audio = given.get("audio") or file or image
    if file is None or ("audio" in given and "image" not in given):
        file = image if image == audio else f"{image}+{audio}"
    return Named(file, image, audio)


def _without_suffix(name: str, kind: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES[kind] else name


def load_names(path: str | Path) -> dict[str, tuple[str, str]]:
    """JSON of boxes, read before by `load_boxes`: {id: (image, audio)} of the entries that name others than the id."""
    named = [names_of(entry, path) for entry in read_entries(path)]
    return {name.id: name[1:] for name in named if name[1:] != (name.id, name.id)}


def load_boxes(path: str | Path) -> dict[str, tuple[str, list[list[float]]]]:
    """VGG-SS JSON: {id: (class name, [[xmin, ymin, xmax, ymax], ...] in 0..1 of the image)}; ids: `names_of`."""
    entries = read_entries(path)
    boxes: dict[str, tuple[str, list[list[float]]]] = {}
    for number, entry in enumerate(entries):
        try:
            drawn = [[float(v) for v in box] for box in entry["bbox"]]
            name, class_name = names_of(entry, path).id, str(entry.get("class") or "")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"entry {number} of {path} is not {{file, class, bbox}}: {entry!s:.80}") from error
        if any(len(box) != 4 or np.isnan(box).any() for box in drawn):
            raise UserError(f"{path}: a box of {name} is not four numbers")
        if any(IN_PIXELS < max(box) < HUGE for box in drawn):
            raise UserError(
                f"{path}: boxes must be [xmin, ymin, xmax, ymax] in 0..1 of the image, {name} has {drawn}, which looks "
                "like pixels"
            )
        if any((box[0] > box[2] or box[1] > box[3]) and np.abs(box).max() < HUGE for box in drawn):
            raise UserError(
                f"{path}: a box of {name} is reversed, {drawn}: give xmin, ymin, xmax, ymax, not width and height"
            )
        if name in boxes:
            raise UserError(f"{path}: {name} is listed twice")
        boxes[name] = (class_name, drawn)
    if not boxes:
        raise UserError(f"the annotation {path} holds no list of entries {{file, class, bbox}}")
    if not any(box_map(drawn).any() for _, drawn in boxes.values()):
        name, (_, drawn) = next(iter(boxes.items()))
        raise UserError(
            f"no box in {path} covers a pixel: boxes must be [xmin, ymin, xmax, ymax] in 0..1 of the image, "
            f"{name} has {drawn}"
        )
    return boxes


def read_entries(path: str | Path) -> list:
    """Entries of a JSON list, or of COCO's format as {file, class, bbox}; empty where it is neither.

    Raises UserError where it is not JSON, or not COCO's format after all.
    """
    try:
        entries = json.loads(read_text(path, "annotation"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read the annotation {path}: {error}") from error
    if isinstance(entries, dict) and {"images", "annotations"} <= entries.keys():
        try:
            return _entries_of_coco(entries)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path} is not COCO's format: {type(error).__name__} {error}") from error
    return entries if isinstance(entries, list) else []


def _entries_of_coco(content: Mapping) -> list[dict]:
    """COCO's images, annotations and categories -> [{file, class, bbox in 0..1}]; an image without boxes has none."""
    names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
    boxes: dict = {image["id"]: [] for image in content["images"]}
    classes: dict = {}
    sizes = {image["id"]: (float(image["width"]), float(image["height"])) for image in content["images"]}
    for drawn in content["annotations"]:
        width, height = sizes[drawn["image_id"]]
        x, y, w, h = map(float, drawn["bbox"])
        boxes[drawn["image_id"]].append([x / width, y / height, (x + w) / width, (y + h) / height])
        classes.setdefault(drawn["image_id"], names.get(drawn.get("category_id"), ""))
    return [
        {
            "file": PurePosixPath(str(image["file_name"]).replace("\\", "/")).stem,
            "class": classes.get(image["id"], ""),
            "bbox": boxes[image["id"]],
        }
        for image in content["images"]
    ]


def load_frames(path: str | Path, masks: bool = False) -> dict[str, list[float] | str]:
    """SSLalignment's JSON of {image, audio, gt_box}: {id: [xmin, ymin, xmax, ymax] in 224 px, or the name of its mask}.

    masks: whether masks, not boxes, are expected. The paths in it are those of its author's machine: only the file
    names are used, without their suffix, as ids.
    """
    frames: dict[str, list[float] | str] = {}
    for number, entry in enumerate(read_entries(path)):
        try:
            name = PurePosixPath(entry["image"]).stem.replace(".mp4_", "_")  # MS3's frames
            drawn = entry["gt_box"]
            drawn = PurePosixPath(drawn).stem if isinstance(drawn, str) else [float(v) for v in drawn]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"entry {number} of {path} is not {{image, audio, gt_box}}: {entry!s:.80}") from error
        if isinstance(drawn, str) != masks:
            holds, wanted = ("boxes", "masks") if masks else ("masks", "boxes")
            raise UserError(
                f"{path} holds {holds}, this set needs {wanted}: take the other of *_bbox.json and *_seg.json"
            )
        if not isinstance(drawn, str) and (len(drawn) != 4 or not np.isfinite(drawn).all()):
            raise UserError(f"{path}: the box of {name} is not four numbers")
        if name in frames:
            raise UserError(f"{path}: {name} is listed twice")
        frames[check_id(name, path)] = drawn
    if not frames:
        raise UserError(f"the annotation {path} holds no list of entries {{image, audio, gt_box}}")
    if not masks and not any(pixel_map(drawn).any() for drawn in frames.values()):
        raise UserError(f"no box in {path} covers a pixel: boxes must be [xmin, ymin, xmax, ymax] of a 224 px image")
    return frames


def pixel_map(box: Sequence[float]) -> torch.Tensor:
    """A box in 224 px -> (224, 224) map, 1 inside: xmin <= x < xmax. Clipped to the image, cut to whole pixels."""
    xmin, ymin, xmax, ymax = (int(min(max(v, 0), MAP_SIZE)) for v in box)
    truth = torch.zeros(MAP_SIZE, MAP_SIZE)
    truth[ymin:ymax, xmin:xmax] = 1
    return truth


def box_map(boxes: Iterable[Sequence[float]]) -> torch.Tensor:
    """Boxes in 0..1 -> (224, 224) map, 1 inside any of them. Clipped to the image, cut to whole pixels."""
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
    except (ParseError, DefusedXmlException, LookupError, TypeError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"cannot read the annotation {path}: {error}") from error
    return truth.clamp(max=1)


def mask_map(path: str | Path) -> torch.Tensor:
    """Mask image -> (224, 224) map, 1 where a pixel is not zero (JPEG: above 127). Nearest; palettes count by index.

    Raises ValueError, naming the file, when it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            threshold = JPEG_MASK_THRESHOLD if image.format == "JPEG" else 0
            if image.mode not in ("1", "L", "P"):
                image = image.convert("L")
            resized = image.resize((MAP_SIZE, MAP_SIZE), Image.Resampling.NEAREST)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the mask {path}: {error}") from error
    return torch.from_numpy((np.array(resized).astype(np.int32) > threshold).astype(np.float32))


# ---------------------------------------------------------------- several sources


class Source(NamedTuple):
    """One thing that sounds in an image."""

    class_name: str
    boxes: list[list[float]]  # [xmin, ymin, xmax, ymax] each, in 0..1


def load_music(path: str | Path) -> tuple[dict[str, list[Source]], int]:
    """MUSIC-Solo's or MUSIC-Duet's JSON -> {frame: its sources}, and how many boxes are empty if read as corners.

    The boxes in it are [x, y, width, height] in 0..1: only so does every one lie within its image.
    """
    frames: dict[str, list[Source]] = {}
    lost = 0
    for number, entry in enumerate(read_entries(path)):
        try:
            name = check_id(str(entry["file"]), path)
            ends = [key.removeprefix("bbox") for key in entry if key.startswith("bbox")]
            drawn = [(str(entry[f"class{end}"]), [float(v) for v in entry[f"bbox{end}"]]) for end in sorted(ends)]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"entry {number} of {path} is not {{file, class, bbox}}: {entry!s:.80}") from error
        if not drawn or any(len(box) != 4 or not np.isfinite(box).all() for _, box in drawn):
            raise UserError(f"{path}: a box of {name} is not four numbers")
        if any(min(box) < 0 or box[0] + box[2] > 1.01 or box[1] + box[3] > 1.01 for _, box in drawn):
            raise UserError(f"{path}: a box of {name} leaves its image: give [x, y, width, height] in 0..1")
        if name in frames:
            raise UserError(f"{path}: {name} is listed twice")
        lost += sum(box[2] <= box[0] or box[3] <= box[1] for _, box in drawn)
        frames[name] = [Source(kind, [[x, y, x + width, y + height]]) for kind, (x, y, width, height) in drawn]
    if not frames:
        raise UserError(f"the annotation {path} holds no list of entries {{file, class, bbox}}")
    return frames, lost


def read_duets(path: str | Path) -> dict[str, tuple[str, str]]:
    """VGGSound-Duet's list (id, class, id, class a line) -> {first id: (first, second)}."""
    lines = [line for line in csv.reader(read_text(path, "list").splitlines()) if line]
    if any(len(line) != 4 for line in lines) or not lines:
        raise UserError(f"{path} must hold lines of id, class, id, class")
    pairs = [tuple(check_id(line[i].strip(), path) for i in (0, 2)) for line in lines]
    if len({first for first, _ in pairs}) < len(pairs):
        twice = repeated([first for first, _ in pairs])
        raise UserError(f"{path} names {len(twice)} ids first twice: {first_ids(twice)}")
    return {first: (first, second) for first, second in pairs}


class Labels(NamedTuple):
    """What VGGSounder says of a video: classes that can be seen, and classes that can be heard."""

    seen: frozenset[str]
    heard: frozenset[str]


def read_labels(path: str | Path) -> dict[str, Labels]:
    """VGGSounder's list of labels with their modality (A audible, V visible, AV both) -> {id: Labels}."""
    rows = read_rows(path)
    if not rows or not {"video_id", "label", "modality"} <= rows[0].keys():
        raise UserError(f"{path} has no rows of columns video_id, label, modality")
    found: dict[str, tuple[set, set]] = {}
    for row in rows:
        if row["modality"] not in ("A", "V", "AV"):
            raise UserError(f"{path}: the modality of {row['video_id']} is {row['modality']!r}, not A, V or AV")
        seen, heard = found.setdefault(row["video_id"], (set(), set()))
        for sense, known in (("V", seen), ("A", heard)):
            if sense in row["modality"]:
                known.add(row["label"])
    return {name: Labels(*map(frozenset, known)) for name, known in found.items()}


# ---------------------------------------------------------------- frames of videos


class FrameTruth(NamedTuple):
    """What AVATAR says of one frame of a video, for one task."""

    video: str
    frame: str
    task: str  # in small letters
    category: str  # of what sounds; empty where the file does not say
    boxes: list[list[float]]  # [xmin, ymin, xmax, ymax] each, in 0..1; empty where the source is off screen
    seconds: float | None  # in its video, where the file says so


class _Note(NamedTuple):
    """One annotation of a frame, in pixels."""

    task: str
    category: str
    box: list[float]  # as it stands there
    outline: np.ndarray  # (n, 2) points of its polygons


OFF_SCREEN = "off-screen"


def load_avatar(folder: str | Path) -> tuple[dict[str, FrameTruth], list[str]]:
    """AVATAR's <folder>/<video>/<frame>.json -> {id: FrameTruth}, and what was noticed, in words.

    An id is <video>_<frame>, and _<task> after it where a frame has annotations of several tasks.
    """
    frames: dict[tuple[str, str], tuple[list[float], float | None, list[_Note]]] = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            entry = json.loads(read_text(path, "annotation"))
            size = [float(entry[key]) for key in ("original_width", "original_height")]
            notes = [_read_note(note) for note in entry["annotations"]]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            wanted = "{original_width, original_height, annotations: [{bbox, task}]}"
            raise UserError(f"{path} is not AVATAR's {wanted}: {error!r:.80}") from error
        if not min(size) > 0:
            raise UserError(f"{path}: an image of {size[0]:g} x {size[1]:g} pixels")
        times = [float(entry[key]) for key in ("time", "timestamp") if isinstance(entry.get(key), int | float)]
        frames[check_id(path.parent.name, path), check_id(path.stem, path)] = size, next(iter(times), None), notes
    if not any(notes for _, _, notes in frames.values()):
        raise Absent(f"{folder} holds no AVATAR annotation <video>/<frame>.json")
    corners, how = _holds_corners([(size, note) for size, _, notes in frames.values() for note in notes], folder)
    found: dict[str, FrameTruth] = {}
    for (video, frame), (size, time, notes) in frames.items():
        tasks = list(dict.fromkeys(note.task for note in notes))
        for task in tasks:
            own = [note for note in notes if note.task == task]
            boxes = [_in_image(note.box, size, corners) for note in own if note.box and task != OFF_SCREEN]
            name = f"{video}_{frame}" + (f"_{task}" if len(tasks) > 1 else "")
            category = ", ".join(sorted({note.category for note in own} - {""}))
            found[name] = FrameTruth(video, frame, task, category, boxes, time)
    bare = sum(not notes for _, _, notes in frames.values())
    return found, [how] + [f"{bare} frames without any annotation are left out"] * bool(bare)


def _read_note(note: Mapping) -> _Note:
    task = "-".join(str(note["task"]).lower().replace("_", " ").replace("-", " ").split())
    box = [float(v) for v in note.get("bbox") or ()]
    if (len(box) != 4 and task != OFF_SCREEN) or not np.isfinite(box).all():
        raise ValueError(f"bbox {note.get('bbox')}")
    outline = note.get("segmentation")
    rings = outline if isinstance(outline, list) and outline and isinstance(outline[0], list) else [outline]
    flat = [float(v) for ring in rings if isinstance(ring, list) and len(ring) % 2 == 0 for v in ring]
    category = next((str(note[key]) for key in ("category", "class", "label") if note.get(key)), "")
    return _Note(task, category, box if len(box) == 4 else [], np.array(flat).reshape(-1, 2))


def _holds_corners(notes: Sequence[tuple[Sequence[float], _Note]], folder: str | Path) -> tuple[bool, str]:
    """Whether boxes are corners rather than [x, y, width, height], as COCO's are: what fits all images and polygons."""
    drawn = [(size, note) for size, note in notes if note.box and note.task != OFF_SCREEN]
    fits, errors = [], []
    for corners in (False, True):
        read = [(size, _pixels(note.box, corners), note.outline) for size, note in drawn]
        inside = [
            box[2] > box[0] and box[3] > box[1] and min(box[:2]) > -2 and box[2] < size[0] + 2 and box[3] < size[1] + 2
            for size, box, _ in read
        ]
        fits.append(all(inside))
        ends = [(box, [*points.min(0), *points.max(0)]) for _, box, points in read if len(points)]
        away = [float(np.abs(np.subtract(box, around)).max()) for box, around in ends]
        errors.append(float(np.median(away)) if away else 0.0)
    if not any(fits):
        raise UserError(f"{folder}: boxes leave their images, read as [x, y, width, height] as well as read as corners")
    corners = errors[1] < errors[0] if all(fits) else fits[1]
    unsure = " (corners would fit as well)" if all(fits) and errors[0] == errors[1] else ""
    return corners, f"boxes were read as {'corners' if corners else '[x, y, width, height]'}{unsure}"


def _pixels(box: Sequence[float], corners: bool) -> list[float]:
    return [*box[:2], *(box[2:] if corners else (box[0] + box[2], box[1] + box[3]))]


def _in_image(box: Sequence[float], size: Sequence[float], corners: bool) -> list[float]:
    return [value / side for value, side in zip(_pixels(box, corners), (*size, *size), strict=True)]
