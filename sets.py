"""Sets by name: test sets and their flags, which of their data are present, broken, or shared with training.

N pairs.
"""

import hashlib
import math
import os
import re
from argparse import Action
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from annotations import (
    GroundTruth,
    first_ids,
    frames_in,
    load_boxes,
    load_frames,
    middle_frame,
    read_ids,
    read_silent_pairs,
)
from audio_io import HOP, SAMPLE_RATE, load_audio, load_power, load_spectrogram
from dataset import TEST_SETS, EvaluationPairs, Pair, build_ground_truth, build_test_set, files_of
from dataset_avs import (
    AVS_SETS,
    FRAME_SETS,
    SOURCE_SETS,
    build_avs_set,
    build_avs_truth,
    build_frame_set,
    build_source_set,
    build_source_truth,
    read_frames,
    read_videos,
)
from distributed import hidden_bar
from transforms import load_image
from utils import Absent, Undecodable, UserError, add_boolean

ALL_SETS = TEST_SETS | AVS_SETS | SOURCE_SETS | FRAME_SETS
BUILDERS = {
    **dict.fromkeys(TEST_SETS, build_test_set),
    **dict.fromkeys(AVS_SETS, build_avs_set),
    **dict.fromkeys(SOURCE_SETS, build_source_set),
    **dict.fromkeys(FRAME_SETS, build_frame_set),
}
SHORT_SECONDS = 5.0  # what the model hears


def add_test_set_flags(group, default: str | None) -> None:
    """The flags that name test sets, the same in testing and training."""
    several = "several separated by commas, or all whose data are present; test_model.py also has synthetic_video"
    group.add_argument("--testset", default=default, help=f"test sets to score: {', '.join(ALL_SETS)}; {several}")
    add_list_flags(group)


def add_list_flags(group) -> None:
    """What replaces a set's own annotation and list."""
    each = "several, separated by commas, are one for each set, or that many sets of one name"
    truth = f"ground truth: a JSON of boxes, for flickr the folder of XML files (default: the set's own); {each}"
    listed = "file of test ids, one per line, in place of the set's own list; several as for --test_gt_path"
    for flag, text in (("--test_gt_path", truth), ("--test_list", listed)):
        group.add_argument(flag, nargs="+", action=Joined, metavar="PATH", help=text)


class Joined(Action):
    """Keeps all values of a flag, however they are given, as one text with commas between them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, ",".join([*([before] if before else []), *values]))


def add_run_data_flags(group) -> None:
    """Where lists are and what to do about missing pairs, the same in testing and training."""
    group.add_argument("--test_data_path", help="root of the test data (default: the set's environment variable)")
    group.add_argument("--metadata", default="./metadata", help="folder of the public lists and annotations")
    add_boolean(group, "--allow_missing", "continue without missing or broken pairs, but count and list them")


def parse_testsets(text: str) -> list[str]:
    names = list(ALL_SETS) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in ALL_SETS]
    if unknown:
        raise UserError(
            f"unknown test set {', '.join(unknown)}: choose from {', '.join(ALL_SETS)}, a comma list, or all"
        )
    return names


class Request(NamedTuple):
    """One set to be scored: a row of ALL_SETS, and what replaces its annotation and its list."""

    name: str
    gt_path: str | None
    test_list: str | None


def requests(args) -> dict[str, Request]:
    """The sets that --testset names, {what results call it: Request}.

    Paths of --test_gt_path and --test_list: one for all sets, or one for each in order. A name that is asked for with
    several of them is called NAME_<file of the list, else of the annotation>, so that no result replaces another.
    """
    names, given = parse_testsets(args.testset), [_paths(getattr(args, f)) for f in ("test_gt_path", "test_list")]
    most = max(1, *map(len, given))
    names = names * most if len(names) == 1 else list(dict.fromkeys(names)) if most == 1 else names
    for flag, paths in zip(("--test_gt_path", "--test_list"), given, strict=True):
        if len(paths) > 1 and len(paths) != len(names):
            raise UserError(f"{flag} gives {len(paths)} paths for {len(names)} test sets: one for all, or one for each")
    columns = [paths * len(names) if len(paths) == 1 else paths or [None] * len(names) for paths in given]
    asked = [Request(*row) for row in zip(names, *columns, strict=True)]
    if len(set(asked)) < len(asked):
        twice = next(one for one in asked if asked.count(one) > 1)
        raise UserError(f"--testset {args.testset} asks for {twice.name} twice with the same list and ground truth")
    if getattr(args, "interactive", None) is not None and all(one.name != "custom" for one in asked):
        raise UserError(f"--interactive is for custom: of {args.testset} it is known")
    named: dict[str, Request] = {}
    for one in asked:
        same = [other for other in asked if other.name == one.name]
        by_list = len({other.test_list for other in same}) > 1
        key = f"{one.name}_{Path(one.test_list if by_list else one.gt_path).stem}" if len(same) > 1 else one.name
        number = sum(other == key or other.rpartition("#")[0] == key for other in named)
        named[f"{key}#{number + 1}" if number else key] = one
    return named


def _paths(text: str | None) -> list[str]:
    """The paths in a flag's text; a comma in the name of a file that is there parts nothing."""
    if not text:
        return []
    return [text] if Path(text).exists() else [path for path in text.split(",") if path]


def build_test_sets(args, image_size: int, audio_seconds: float) -> dict[str, EvaluationPairs]:
    """The sets that --testset names, with their images and audio, as a model takes them.

    With --allow_missing every pair is decoded once, and those that are missing or cannot be decoded are left out.
    """

    def build(name: str, request: Request) -> EvaluationPairs:
        pairs = build_pairs(name, request, args, image_size, audio_seconds, args.allow_missing)
        if not args.allow_missing:
            return pairs
        broken = undecodable(pairs.pairs, args.num_workers, pairs.ground_truth.truth_of)
        return pairs.without(broken) if broken else pairs

    return build_each(args, build)


def build_pairs(
    name: str, request: Request, args, image_size: int, audio_seconds: float, allow_missing: bool
) -> EvaluationPairs:
    """One set of the table; name: what results call it."""
    paths = args.test_data_path, request.gt_path, args.metadata
    own = {"interactive": getattr(args, "interactive", None)} if request.name in TEST_SETS else {}
    built = BUILDERS[request.name](
        request.name, *paths, image_size, audio_seconds, request.test_list, allow_missing, **own
    )
    built.ground_truth = built.ground_truth._replace(name=name)
    return built


def truth_of_request(request: Request, args) -> GroundTruth:
    name, paths = request.name, (args.test_data_path, request.gt_path, args.metadata, request.test_list)
    if name in AVS_SETS:
        return build_avs_truth(name, *paths, args.allow_missing)
    if name in FRAME_SETS:
        return read_frames(name, args.test_data_path, request.gt_path, request.test_list)[1]
    if name in SOURCE_SETS:
        return build_source_truth(name, *paths)
    return build_ground_truth(name, *paths, getattr(args, "interactive", None))


def build_ground_truths(args) -> dict[str, GroundTruth]:
    """What the sets that --testset names ask for; their images and audio need not be there."""

    def build(name: str, request: Request) -> GroundTruth:
        return truth_of_request(request, args)._replace(name=name)

    return build_each(args, build)


def build_each(args, build: Callable[[str, Request], Any]) -> dict:
    """Every named set; for `all` those whose data are there, and a line about each of the others."""
    built, asked = {}, requests(args)
    masked = [one.name for one in asked.values() if ALL_SETS[one.name].kind == "masks" and one.name in AVS_SETS]
    if args.test_gt_path and len(masked) == len(asked):
        raise UserError(f"--test_gt_path does not apply to {masked[0]}: its masks are below the data's root")
    for name, request in asked.items():
        try:
            built[name] = build(name, request)
        except Absent as error:
            if args.testset != "all":
                raise
            print(f"left out: {name} ({error})")
    if not built:
        raise UserError("--testset all: the data of no test set are there")
    return built


# ---------------------------------------------------------------- what is broken


class Facts(NamedTuple):
    """What decoding one pair showed."""

    error: str  # why it cannot be decoded; empty when it can
    silent: bool  # digital zero throughout
    seconds: float
    digest: str  # of pixels and samples; empty when it cannot be decoded


class _Inspected(Dataset):
    def __init__(self, pairs: Sequence[Pair], truth_of: Callable | None) -> None:
        self.pairs, self.truth_of = pairs, truth_of

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Facts:
        return inspect_pair(self.pairs[index], self.truth_of)


def inspect_pair(pair: Pair, truth_of: Callable | None = None) -> Facts:
    """Decode one pair, all of a folder of frames, and its ground truth where truth_of is given."""
    try:
        if truth_of:
            truth_of(pair.id)
        content, heard, lengths = b"", [], []
        pair = pair.fetched()
        for path in files_of(pair.image):
            for frame in frames_in(path) if os.path.isdir(path) else ():
                load_image(frame)
            content += load_image(middle_frame(path)).tobytes()
        for path in files_of(pair.audio):
            values, seconds = _whole_audio(path)
            content += values.tobytes()  # the pixels and samples, without file headers and metadata
            heard.append(values.any())
            lengths.append(seconds)
            load_spectrogram(path, SHORT_SECONDS)
    except (ValueError, OSError, UserError) as error:
        return Facts(" ".join(str(error).split()), False, math.nan, "")
    return Facts("", not any(heard), min(lengths), hashlib.sha1(content).hexdigest())


def _whole_audio(path: str) -> tuple[np.ndarray, float]:
    """Samples, or a stored spectrogram, and their length in seconds."""
    if path.endswith(".npy"):
        power = load_power(path)
        return power, (power.shape[2] - 1) * HOP / SAMPLE_RATE
    waveform = load_audio(path)
    return waveform, len(waveform) / SAMPLE_RATE


def inspect_pairs(pairs: Sequence[Pair], workers: int = 0, truth_of: Callable | None = None) -> list[Facts]:
    """Decode every pair, and its ground truth where truth_of is given, in several processes -> its facts, in order."""
    loader = DataLoader(_Inspected(pairs, truth_of), batch_size=None, num_workers=workers)
    return list(tqdm(loader, "decoding every pair", len(pairs), leave=False, unit="pair", disable=hidden_bar()))


def undecodable(pairs: Sequence[Pair], workers: int = 0, truth_of: Callable | None = None) -> dict[str, str]:
    """{id: reason} of the pairs that cannot be decoded."""
    found = zip(pairs, inspect_pairs(pairs, workers, truth_of), strict=True)
    return {pair.id: facts.error for pair, facts in found if facts.error}


@contextmanager
def count_undecodable(pairs: Sequence[Pair], workers: int = 0, truth_of: Callable | None = None):
    """Where a pair cannot be decoded in the block, look at all of them: UserError with their count and first ids."""
    try:
        yield
    except Undecodable as error:
        broken = undecodable(pairs, workers, truth_of)
        if not broken:
            raise
        raise UserError(
            f"{len(broken)} of {len(pairs)} pairs cannot be decoded: {first_ids(list(broken))}. "
            f"The first: {next(iter(broken.values()))} (--allow_missing true continues without them and counts them)"
        ) from error


# ---------------------------------------------------------------- what is shared with training

SAME_VIDEO = " (same video, perhaps another part)"


def video_of(name: str) -> str:
    """The YouTube video that a name stands for, <id> as in S4 or <id>_<second> as in VGG-Sound; else empty."""
    found = re.fullmatch(r"([\w-]{11})(_\d{6})?", name)
    return found[1] if found else ""


def known_test_ids(metadata: str | Path) -> dict[str, set[str]]:
    """Names of the images and audio of every known test set whose list or annotation is in the metadata folder.

    {set: names}; S4's are YouTube ids.
    """
    known: dict[str, set[str]] = {}
    for name, row in TEST_SETS.items():
        path = Path(metadata) / (row.ids or row.annotation or "absent")
        if row.lists_in_root or not path.is_file():
            continue
        if row.ids:
            known[name] = set(read_ids(path))
        else:
            known[name] = set(load_boxes(path) if row.kind == "boxes" else load_frames(path, row.kind == "masks"))
        if row.silent and (Path(metadata) / row.silent).is_file():
            known[name].update(*read_silent_pairs(Path(metadata) / row.silent).values())
    s4 = Path(metadata) / AVS_SETS["s4"].ids
    if s4.is_file():
        known["s4"] = {video.name for video in read_videos(s4)}
    return known


def overlap_with_tests(ids: Sequence[str], metadata: str | Path) -> dict[str, list[str]]:
    """Training ids that are also test ids, by test set, as far as its list is in the metadata folder.

    "SET (same video ...)": training ids that are no test ids, but of the same YouTube video as one.
    """
    found: dict[str, list[str]] = {}
    for name, tested in known_test_ids(metadata).items():
        videos = {video_of(i) for i in tested} - {""}
        found[name] = [i for i in ids if i in tested]
        found[name + SAME_VIDEO] = [i for i in ids if i not in tested and video_of(i) in videos]
    return found


def trained_on(train_ids: Sequence[str], truth: GroundTruth, ids: Sequence[str]) -> dict[str, int]:
    """How much of the scored `ids` of a test set was trained on, by the rule of `overlap_with_tests`.

    pairs: whose image or audio is that of a training pair, or whose video has one (S4); images, audio: those of which
    it is the image, the audio, of several one at least; same_video: further pairs of the same YouTube video as a
    training pair.
    """
    known, videos = set(train_ids), {video_of(i) for i in train_ids} - {""}
    found = dict.fromkeys(("pairs", "images", "audio", "same_video"), 0)
    for i in ids:
        images, audio = map(files_of, truth.sources.get(i, (i, i)))
        whole_video = truth.unit_of.get(i, "")
        found["images"] += not known.isdisjoint(images)
        found["audio"] += not known.isdisjoint(audio)
        if not known.isdisjoint([*images, *audio]) or (whole_video == video_of(whole_video) and whole_video in videos):
            found["pairs"] += 1
        elif not videos.isdisjoint(map(video_of, [*images, *audio])):
            found["same_video"] += 1
    return found
