"""Sets whose items are not an image and an audio file of one name: frames of videos, and several sources at once.

AVSBench, single source (S4) and multiple sources (MS3): one item is one frame, its ground truth a mask. Both layouts
load: the official one and the flat one, ROOT/{s4,ms3}/{visual_frames,gt_masks,audio_wav}. Only the videos of split
`test` are scored, five frames each, which share their audio.

Sets of several sources, MUSIC, VGGSound-Single and -Duet, and a built-in duet: one item is one source, <image>_<number>
where an image has two. Its audio is that of all of them. AVATAR: one item is one frame, with the audio around it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import media
from annotations import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    OFF_SCREEN,
    FrameTruth,
    GroundTruth,
    Source,
    box_map,
    check_id,
    first_ids,
    index_folder,
    load_avatar,
    load_boxes,
    load_frames,
    load_music,
    mask_map,
    pixel_map,
    read_duets,
    read_ids,
    read_rows,
    repeated,
)
from dataset import EvaluationPairs, Pair, SetRow, data_root, find_files, find_pairs, folders_to
from maps import MAP_SIZE
from utils import Absent, Undecodable, UserError, as_user_error

FRAMES_PER_VIDEO = 5
AVS_SETS = {
    "s4": SetRow("s4", "AVSBENCH_ROOT", "s4_meta_data.csv", expected=3_700, kind="masks"),
    "ms3": SetRow("ms3", "AVSBENCH_ROOT", "ms3_meta_data.csv", expected=320, kind="masks"),
    "s4_box": SetRow("s4", "AVSBENCH_ROOT", "s4_meta_data.csv", "s4_box.json", 3_700, "pixels"),
    "ms3_box": SetRow("ms3", "AVSBENCH_ROOT", "ms3_meta_data.csv", "ms3_box.json", 320, "pixels"),
    "s4_robust": SetRow("s4", "AVSBENCH_ROOT", "s4_meta_data.csv", expected=3_700, kind="masks"),
    "ms3_robust": SetRow("ms3", "AVSBENCH_ROOT", "ms3_meta_data.csv", expected=320, kind="masks"),
}
ROBUST = ("s4_robust", "ms3_robust")  # AVSBench-Robust (arXiv 2502.00358)
SOURCE_SETS = {
    "music_solo": SetRow("music", "MUSIC_ROOT", "music_solo_test.csv", "music_solo.json", 2_124, "music"),
    "music_duet": SetRow(
        "music", "MUSIC_ROOT", "music_duet_test.csv", "music_duet.json", 2_040, "music", interactive=True
    ),
    "vggsound_single": SetRow("vggsound", "VGGSOUND_ROOT", "vggsound_single_test.csv", "vggss.json", 5_158, "single"),
    "vggsound_duet": SetRow(
        "vggsound", "VGGSOUND_ROOT", "vggsound_duet_test.csv", "vggss.json", 10_316, "duet", interactive=True
    ),
    "synthetic_duet": SetRow(
        "vggsound", "data/synthetic", "test.txt", "test.json", None, "duet", lists_in_root=True, interactive=True
    ),
}
FRAME_SETS = {"avatar": SetRow("avatar", "AVATAR_ROOT", None, "metadata", 24_266, "frames")}


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
    truth = GroundTruth(name, list(files), truth_of, expected, categories, videos, masks=masks, robust=name in ROBUST)
    return truth, files


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


# ---------------------------------------------------------------- several sources


class Scene(NamedTuple):
    """One image of a set of several sources."""

    image: str
    sources: list[Source]
    videos: list[str]  # the ids whose image and audio make it: one, or one for each source
    unit: str  # what the bootstrap draws: its video


def build_source_truth(
    name: str, root: str | None, gt_path: str | None, metadata: str, test_list: str | None = None
) -> GroundTruth:
    """What a row of SOURCE_SETS asks for; images and audio need not be there."""
    scenes, notes = read_scenes(name, root, gt_path, metadata, test_list)
    return _source_truth(name, entries_of(scenes, SOURCE_SETS[name].interactive), notes)


def read_scenes(
    name: str, root: str | None, gt_path: str | None, metadata: str, test_list: str | None
) -> tuple[list[Scene], list[str]]:
    """The images of a row of SOURCE_SETS, and notes about it. test_list: in place of the row's own list."""
    row = SOURCE_SETS[name]
    folder = data_root(row, root, "--test_data_path") if row.lists_in_root else Path(metadata)
    listed, annotation = Path(test_list or folder / row.ids), Path(gt_path or folder / row.annotation)
    if row.kind == "music":
        frames, lost = load_music(annotation)
        ids = read_ids(listed)
        _refuse_unknown([i for i in ids if i not in frames], annotation, listed)
        count = sum(len(found) for found in frames.values())
        read = f"read as corners, as published codes do, {lost:,} of {count:,} are empty"
        note = f"boxes are [x, y, width, height]; {read}"
        return [Scene(i, frames[i], [i], _video_of(i)) for i in ids], [note]
    boxes = load_boxes(annotation)
    pairs = {i: (i,) for i in read_ids(listed)} if row.kind == "single" or row.lists_in_root else read_duets(listed)
    if row.kind == "duet" and row.lists_in_root:
        pairs = pair_up({i: boxes[i][0] for i in pairs if i in boxes})
    _refuse_unknown([i for videos in pairs.values() for i in videos if i not in boxes], annotation, listed)
    return [Scene(i, [Source(*boxes[video]) for video in videos], [*videos], i) for i, videos in pairs.items()], []


def _refuse_unknown(unknown: Sequence[str], annotation: Path, listed: Path) -> None:
    if unknown:
        raise UserError(f"{annotation} has no box for {len(unknown)} ids of {listed}: {first_ids(unknown)}")


def _video_of(frame: str) -> str:
    """MUSIC's frame <video>_<clip>_<number> -> its video."""
    return frame.rsplit("_", 2)[0]


def pair_up(class_of: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """{id: class} -> {id: (id, one of another class)}: every id is first once and second once."""
    ids = sorted(class_of, key=lambda i: (class_of[i], i))
    most = max(Counter(class_of.values()).values(), default=0)
    if 2 * most > len(ids):
        raise UserError(f"{most} of {len(ids)} pairs are of one class: they cannot be paired with others")
    return dict(sorted((i, (i, ids[(at + most) % len(ids)])) for at, i in enumerate(ids)))


class Entry(NamedTuple):
    """One source of a scene."""

    scene: Scene
    place: int  # among its sources
    siblings: list[str]  # ids of all of them

    @property
    def source(self) -> Source:
        return self.scene.sources[self.place]


def entries_of(scenes: Sequence[Scene], interactive: bool) -> dict[str, Entry]:
    """{id: source}; the id is that of the image, and _<number> after it where images have several sources."""
    entries = {}
    for scene in scenes:
        ids = [f"{scene.image}_{k + 1}" if interactive else scene.image for k in range(len(scene.sources))]
        entries |= {i: Entry(scene, k, ids) for k, i in enumerate(ids)}
    return entries


def _source_truth(name: str, entries: Mapping[str, Entry], notes: Sequence[str]) -> GroundTruth:
    row = SOURCE_SETS[name]
    together = {i: frozenset(source.class_name for source in entry.scene.sources) for i, entry in entries.items()}
    return GroundTruth(
        name,
        list(entries),
        partial(_scene_truth, entries),
        max(len(entries), row.expected or 0),
        {i: entry.source.class_name for i, entry in entries.items()},
        {i: entry.scene.unit for i, entry in entries.items()},
        interactive=row.interactive,
        sources={i: (entry.scene.videos, entry.scene.videos) for i, entry in entries.items()},
        siblings={i: entry.siblings for i, entry in entries.items()},
        seen=together,
        heard=together,
        notes=notes,
    )


def _scene_truth(entries: Mapping[str, Entry], name: str) -> torch.Tensor:
    """The boxes of one source; where several images stand side by side, (224, 224 for each)."""
    entry = entries[name]
    images = len(entry.scene.videos)
    truth = torch.zeros(MAP_SIZE, MAP_SIZE * images)
    left = MAP_SIZE * entry.place if images > 1 else 0
    truth[:, left : left + MAP_SIZE] = box_map(entry.source.boxes)
    return truth


def build_source_set(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    image_size: int,
    audio_seconds: float,
    test_list: str | None = None,
    allow_missing: bool = False,
) -> EvaluationPairs:
    """A row of SOURCE_SETS with its images, audio and ground truth; test_list replaces the row's own list."""
    row = SOURCE_SETS[name]
    folder = data_root(row, root, "--test_data_path")
    scenes, notes = read_scenes(name, root, gt_path, metadata, test_list)
    entries = entries_of(scenes, row.interactive)
    videos = list(dict.fromkeys(video for scene in scenes for video in scene.videos))
    found, _ = find_pairs(folder, row.layout, videos, allow_missing, _audio_of(row, folder, videos))
    there, pairs, missing, alone = {pair.id: pair for pair in found}, [], [], {}
    for i, entry in entries.items():
        parts = [there[video] for video in entry.scene.videos if video in there]
        if len(parts) < len(entry.scene.videos):
            missing.append(i)
        elif len(parts) == 1:
            pairs.append(parts[0]._replace(id=i))
        else:
            pairs.append(Pair(i, tuple(part.image for part in parts), tuple(part.audio for part in parts)))
            alone[i] = parts[entry.place].audio
    dataset = EvaluationPairs(pairs, _source_truth(name, entries, notes), missing, image_size, audio_seconds)
    dataset.alone = alone
    return dataset


def _audio_of(row: SetRow, folder: Path, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{id: (its image, its audio)}: MUSIC's frames have audio of their own, or all share that of their video."""
    if row.kind != "music":
        return {}
    audio = find_files(folder, row.layout).audio
    return {i: (i, next((name for name in (i, i.rpartition("_")[0]) if name in audio), _video_of(i))) for i in ids}


# ---------------------------------------------------------------- frames of videos

FRAME_FOLDERS, SOUND_FOLDERS, FILM_FOLDERS = ("frames", "images"), ("audio", "audio_wav"), ("videos", "video")
CROSS_EVENT = "cross-event"  # frames of videos in which what sounds changes from frame to frame


def read_frames(
    name: str, root: str | None, gt_path: str | None, test_list: str | None
) -> tuple[dict[str, FrameTruth], GroundTruth]:
    """What a row of FRAME_SETS asks for; test_list: ids in place of all that are annotated."""
    row = FRAME_SETS[name]
    folder = Path(gt_path) if gt_path else data_root(row, root, "--test_data_path") / row.annotation
    frames, notes = load_avatar(folder)
    if test_list:
        ids = read_ids(test_list)
        _refuse_unknown([i for i in ids if i not in frames], folder, Path(test_list))
        frames = {i: frames[i] for i in ids}
    by_frame: dict[tuple[str, str], set[tuple[str, str]]] = {}  # what sounds in it; several tasks may share a frame
    for frame in frames.values():
        by_frame.setdefault((frame.video, frame.frame), set()).add((frame.task, frame.category))
    by_video: dict[str, set[frozenset]] = {}
    for (video, _), what in by_frame.items():
        by_video.setdefault(video, set()).add(frozenset(what))
    parts = {task: frozenset(i for i, frame in frames.items() if frame.task == task) for task in
             sorted({frame.task for frame in frames.values()})}  # fmt: skip
    parts[CROSS_EVENT] = frozenset(i for i, frame in frames.items() if len(by_video[frame.video]) > 1)
    truth = GroundTruth(
        name,
        list(frames),
        partial(_frame_truth, frames),
        len(frames) if test_list else max(len(frames), row.expected),
        {i: frame.category for i, frame in frames.items() if frame.category},
        {i: frame.video for i, frame in frames.items()},
        frozenset(i for i, frame in frames.items() if frame.task == OFF_SCREEN),
        parts={part: ids for part, ids in parts.items() if ids},
        notes=notes,
    )
    return frames, truth


def _frame_truth(frames: Mapping[str, FrameTruth], name: str) -> torch.Tensor:
    return box_map(frames[name].boxes)


def build_frame_set(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    image_size: int,
    audio_seconds: float,
    test_list: str | None = None,
    allow_missing: bool = False,
) -> EvaluationPairs:
    """A row of FRAME_SETS with its images, audio and ground truth, each frame with the audio around it."""
    frames, truth = read_frames(name, root, gt_path, test_list)
    folder = data_root(FRAME_SETS[name], root, "--test_data_path")
    sounds = _files_in(folder, SOUND_FOLDERS, "audio")
    images = {video: _files_in(folder, [f"{place}/{video}" for place in FRAME_FOLDERS], "image")
              for video in {frame.video for frame in frames.values()}}  # fmt: skip
    pairs = [
        Pair(i, images[frame.video][frame.frame], sounds[frame.video])
        for i, frame in frames.items()
        if frame.frame in images[frame.video] and frame.video in sounds
    ]
    there = {pair.id for pair in pairs}
    missing = [i for i in frames if i not in there]
    wanted = f"frames/<video>/<frame>.jpg and audio/<video>.wav below {folder}"
    if not pairs:
        raise Absent(f"no frame of {name} was found: {wanted}; looked for {first_ids(missing, 2)}")
    if missing and not allow_missing:
        raise UserError(
            f"{len(missing)} of {len(frames)} frames of {name} lack their image or audio, {wanted}: "
            f"{first_ids(missing)} (--allow_missing true continues without them and counts them)"
        )
    dataset = EvaluationPairs(pairs, truth, missing, image_size, audio_seconds)
    dataset.at = times_of({i: frames[i] for i in there}, folder)
    return dataset


def _files_in(folder: Path, places: Sequence[str], kind: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for place in reversed(places):
        if (folder / place).is_dir():
            found |= index_folder(folder / place, kind)[0]
    return found


def times_of(frames: Mapping[str, FrameTruth], folder: Path) -> dict[str, float]:
    """{id: second in its video}: as the annotation says, else the number of the frame by the rate of its video.

    The rate is that of videos/<video>.*, or of fps.csv (video, fps). UserError for a frame whose time is not known.
    """
    films = _files_in(folder, FILM_FOLDERS, "audio")  # which films are, too
    table = folder / "fps.csv"
    rates = {row["video"]: row["fps"] for row in read_rows(table)} if table.is_file() else {}
    times, known = {}, {}
    for i, frame in frames.items():
        if frame.seconds is not None:
            times[i] = frame.seconds
            continue
        if frame.video not in known:
            known[frame.video] = _rate(frame.video, rates, films, table)
        digits = "".join(sign if sign.isdigit() else " " for sign in frame.frame).split()
        if not digits:
            raise UserError(f"frame {frame.frame} of video {frame.video}: its name holds no number, its JSON no `time`")
        times[i] = int(digits[-1]) / known[frame.video]
    return times


def _rate(video: str, rates: Mapping[str, str], films: Mapping[str, str], table: Path) -> float:
    try:
        if video in rates:
            rate = float(rates[video])
        else:
            with media.open(films[video]) as film:
                rate = film.rate
    except KeyError:
        raise UserError(
            f"when is a frame of {video}? Put its film into {table.with_name('videos')}, or its frames per second into "
            f"{table} (video,fps)"
        ) from None
    except ValueError as error:
        raise UserError(f"{table}: the frames per second of {video} are {rates[video]!r}") from error
    if not 0 < rate < 1000:
        raise UserError(f"{video}: {rate:g} frames per second")
    return rate
