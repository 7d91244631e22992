"""AVSBench, single source (S4) and multiple sources (MS3): one item is one frame, its ground truth a mask.

Both layouts load: the official one and the flat one, ROOT/{s4,ms3}/{visual_frames,gt_masks,audio_wav}.
Only the videos of split `test` are scored, five frames each, which share their audio.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from annotations import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    GroundTruth,
    check_id,
    first_ids,
    load_frames,
    mask_map,
    pixel_map,
    read_rows,
    repeated,
)
from dataset import EvaluationPairs, Pair, SetRow, data_root, folders_to
from utils import Absent, Undecodable, UserError, as_user_error

FRAMES_PER_VIDEO = 5
AVS_SETS = {
    "s4": SetRow("s4", "AVSBENCH_ROOT", "s4_meta_data.csv", expected=3_700, kind="masks"),
    "ms3": SetRow("ms3", "AVSBENCH_ROOT", "ms3_meta_data.csv", expected=320, kind="masks"),
    "s4_box": SetRow("s4", "AVSBENCH_ROOT", "s4_meta_data.csv", "s4_box.json", 3_700, "pixels"),
    "ms3_box": SetRow("ms3", "AVSBENCH_ROOT", "ms3_meta_data.csv", "ms3_box.json", 320, "pixels"),
}


class Video(NamedTuple):
    name: str
    category: str  # empty on MS3


class Files(NamedTuple):
    image: Path
    mask: Path
    audio: Path


def read_videos(path: Path, split: str = "test") -> list[Video]:
    """Videos of a split from s4_meta_data.csv (name, start, category, split) or ms3_meta_data.csv (video_id, split)."""
    rows = [row for row in read_rows(path) if row.get("split") == split]
    names = [row.get("name") or row.get("video_id") for row in rows]
    if not names or not all(names):
        raise UserError(f"{path} has no videos of split {split}: it needs the columns split, and name or video_id")
    videos = [Video(check_id(name, path), row.get("category") or "") for name, row in zip(names, rows, strict=True)]
    for video in videos:
        check_id(video.category or video.name, path)
    if len(set(names)) < len(names):
        raise UserError(f"{path} names videos twice: {first_ids(repeated(names))}")
    return videos


def frame_files(
    root: Path, official: Path | None, subset: str, video: Video, number: int, split: str = "test"
) -> Files:
    """Paths of frame 1..5 of a video, in the authors' folder <subset>_data if there is one, else in the flat layout.

    Any format is accepted: the released one first, then the others in order; without a file, the released path.
    """
    name = f"{video.name}_{number}"
    if official is None:
        flat = root / subset
        places = flat / "visual_frames" / name, flat / "gt_masks" / name, flat / "audio_wav" / video.name
    else:
        below = Path(split, video.category)  # MS3 has no categories
        image = official / "visual_frames" / below / video.name / name
        if subset == "ms3":
            image = official / "visual_frames" / video.name / f"{video.name}.mp4_{number}"
        mask = official / "gt_masks" / below / video.name / name
        places = image, mask, official / "audio_wav" / below / video.name
    kinds = ((".png", IMAGE_SUFFIXES), (".png", (".png", ".jpg")), (".wav", AUDIO_SUFFIXES))
    return Files(*(_first_there(place, *kind) for place, kind in zip(places, kinds, strict=True)))


def release_folder(root: Path, subset: str) -> Path | None:
    """<subset>_data in the root or, as the authors lay it out, in a folder of it such as Single-source/."""
    return next((place for place in folders_to(root, 4) if place.name == f"{subset}_data"), None)


def _first_there(place: Path, released: str, suffixes: Sequence[str]) -> Path:
    files = [place.with_name(place.name + suffix) for suffix in (released, *suffixes)]
    return next((file for file in files if file.is_file()), files[0])


def _mask_truth(files: dict[str, Files], frame: str) -> torch.Tensor:
    with as_user_error(ValueError, kind=Undecodable):
        return mask_map(files[frame].mask)


def _box_truth(boxes: dict, frame: str) -> torch.Tensor:
    return pixel_map(boxes[frame])


def own_list(row: SetRow, official: Path | None, metadata: str) -> Path:
    """The list of videos in the metadata folder or, where it is not there, beside the released data."""
    wanted = Path(metadata) / row.ids
    places = [wanted] if official is None else [wanted, official.parent / row.ids, official / row.ids]
    return next((place for place in places if place.is_file()), wanted)


def find_frames(
    name: str, root: str | None, gt_path: str | None, metadata: str, test_list: str | None
) -> tuple[GroundTruth, dict[str, Files]]:
    """What a row of AVS_SETS asks for, and where each frame's files should lie.

    gt_path: the JSON of boxes, for a row of boxes; test_list replaces the row's own metadata CSV.
    """
    row = AVS_SETS[name]
    folder = data_root(row, root, "--test_data_path")
    files, categories, videos = {}, {}, {}
    official = release_folder(folder, row.layout)
    for video in read_videos(Path(test_list) if test_list else own_list(row, official, metadata)):
        for number in range(1, FRAMES_PER_VIDEO + 1):
            frame = f"{video.name}_{number}"
            files[frame], categories[frame] = frame_files(folder, official, row.layout, video, number), video.category
            videos[frame] = video.name
    truth_of = partial(_mask_truth, files)
    if row.kind == "pixels":
        boxes = load_frames(gt_path or Path(metadata) / row.annotation)
        unknown = [frame for frame in files if frame not in boxes]
        if unknown:
            raise UserError(f"{row.annotation} has no box for {len(unknown)} frames of {name}: {first_ids(unknown)}")
        truth_of = partial(_box_truth, boxes)
    expected = len(files) if test_list else max(len(files), row.expected)
    masks = row.kind == "masks"
    return GroundTruth(name, list(files), truth_of, expected, categories, videos, masks=masks), files


def build_avs_truth(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    test_list: str | None = None,
    allow_missing: bool = False,
) -> GroundTruth:
    """What a row of AVS_SETS asks for. Its masks must be there, unless allow_missing; images and audio need not."""
    ground_truth, files = find_frames(name, root, gt_path, metadata, test_list)
    lost = {frame: paths.mask for frame, paths in files.items() if ground_truth.masks and not paths.mask.is_file()}
    if lost and (not allow_missing or len(lost) == len(files)):
        first = next(iter(lost.values()))
        raise UserError(f"{len(lost)} of {len(files)} masks of {name} are missing: first {first}")
    return ground_truth._replace(ids=[frame for frame in files if frame not in lost])


def build_avs_set(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    image_size: int,
    audio_seconds: float,
    test_list: str | None = None,
    allow_missing: bool = False,
) -> EvaluationPairs:
    """A row of AVS_SETS with its images, audio and ground truth; test_list replaces the row's own metadata CSV."""
    ground_truth, files = find_frames(name, root, gt_path, metadata, test_list)
    needed = ("image", "audio", "mask") if ground_truth.masks else ("image", "audio")
    missing = [frame for frame, paths in files.items() if not all(getattr(paths, kind).is_file() for kind in needed)]
    if len(missing) == len(files):
        raise Absent(f"no frame of {name} was found: looked for {files[missing[0]].image}")
    if missing and not allow_missing:
        raise UserError(
            f"{len(missing)} of {len(files)} frames of {name} lack their image, mask or audio, first "
            f"{files[missing[0]].image}: {first_ids(missing)} "
            "(--allow_missing true continues without them and counts them)"
        )
    lost = set(missing)
    pairs = [Pair(frame, str(paths.image), str(paths.audio)) for frame, paths in files.items() if frame not in lost]
    return EvaluationPairs(pairs, ground_truth, missing, image_size, audio_seconds)
