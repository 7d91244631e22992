"""What is really in the files of a set: do they decode, sound, repeat; which ids are trained and tested on.

N pairs.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from annotations import HUGE, first_ids, load_boxes, load_frames, read_entries, read_ids, read_silent_pairs
from audio_io import HOP, SAMPLE_RATE, load_audio, load_power, load_spectrogram
from dataset import TEST_SETS, Pair, SetRow
from dataset_avs import AVS_SETS, read_videos
from distributed import hidden_bar
from scoring.metrics import MAP_SIZE
from transforms import load_image
from utils import Undecodable, UserError

SHORT_SECONDS = 5.0  # what the model hears
SAME_VIDEO = "s4 (same video, perhaps another part)"


class Facts(NamedTuple):
    """What decoding one pair showed."""

    error: str  # why it cannot be decoded; empty when it can
    silent: bool  # digital zero throughout
    seconds: float
    digest: str  # of what is seen and heard; empty when it cannot be decoded


class _Inspected(Dataset):
    def __init__(self, pairs: Sequence[Pair], truth_of: Callable | None) -> None:
        self.pairs, self.truth_of = pairs, truth_of

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Facts:
        pair = self.pairs[index]
        try:
            picture = load_image(pair.image)
            if self.truth_of:
                self.truth_of(pair.id)
            if pair.audio.endswith(".npy"):
                heard = load_power(pair.audio)
                seconds = (heard.shape[2] - 1) * HOP / SAMPLE_RATE
            else:
                heard = load_audio(pair.audio)
                seconds = len(heard) / SAMPLE_RATE
            load_spectrogram(pair.audio, SHORT_SECONDS)
            content = picture.tobytes() + heard.tobytes()  # what is seen and heard, whatever the files say besides
        except (ValueError, OSError, UserError) as error:
            return Facts(" ".join(str(error).split()), False, math.nan, "")
        return Facts("", not heard.any(), seconds, hashlib.sha1(content).hexdigest())


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
            f"The first: {next(iter(broken.values()))} (--allow_missing true goes on without them and counts them)"
        ) from error


# ---------------------------------------------------------------- lists and annotations


def known_test_ids(metadata: str | Path) -> dict[str, set[str]]:
    """Ids of every known test set whose list or annotation lies in the folder of metadata: {set: ids}.

    S4's videos come from YouTube as VGG-Sound's do: under "s4 (same video ...)" stand YouTube ids.
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
        known[SAME_VIDEO] = {video.name for video in read_videos(s4)}
    return known


def overlap_with_tests(ids: Sequence[str], metadata: str | Path) -> dict[str, list[str]]:
    """Training ids that are also test ids, by test set, as far as its list is in the folder of metadata.

    VGG-Sound's ids are <youtube id>_<start>; S4's videos are compared by YouTube id alone.
    """
    return {
        name: [i for i in ids if (i.rpartition("_")[0] if name == SAME_VIDEO else i) in tested]
        for name, tested in known_test_ids(metadata).items()
    }


def annotation_problems(row: SetRow, path: Path) -> dict[str, int]:
    """Boxes of a JSON that are clipped, count as empty or cannot be read: {what: how many}; {} for other kinds."""
    if row.kind not in ("boxes", "pixels"):
        return {}
    side = 1.0 if row.kind == "boxes" else float(MAP_SIZE)
    entries = [entry for entry in read_entries(path) if isinstance(entry, dict)]
    drawn = [entry.get("bbox") or () if row.kind == "boxes" else [entry.get("gt_box")] for entry in entries]
    problems = dict.fromkeys(("not a number", "outside the picture", "beyond a million", "without area"), 0)
    for box in (box for boxes in drawn for box in boxes):
        try:
            values = np.array([float(v) for v in box])
        except (TypeError, ValueError):
            values = np.full(4, np.nan)
        if values.shape != (4,) or np.isnan(values).any():
            problems["not a number"] += 1
            continue
        pixels = (np.clip(values / side, 0, 1) * MAP_SIZE).astype(int)
        problems["outside the picture"] += bool((values < 0).any() or (values > side).any())
        problems["beyond a million"] += bool((np.abs(values) > HUGE).any())
        problems["without area"] += bool((pixels[2:] <= pixels[:2]).any())
    return problems


# ---------------------------------------------------------------- one table


def check_table(
    name: str,
    expected: int,
    pairs: Sequence[Pair],
    missing: Sequence[str],
    facts: Sequence[Facts],
    problems: Mapping[str, int],
    overlap: Mapping[str, Sequence[str]],
) -> str:
    """What `prepare_data.py check` prints: counts, and the first ids of whatever is not as it should be."""

    def of(wanted) -> list[str]:
        return [pair.id for pair, fact in zip(pairs, facts, strict=True) if wanted(fact)]

    digests = Counter(fact.digest for fact in facts if fact.digest)
    broken = of(lambda fact: fact.error)
    rows: list[tuple[str, int, Sequence[str]]] = [
        ("expected", expected, ()),
        ("present", len(pairs), ()),
        ("missing", max(expected - len(pairs), len(missing)), missing),
        ("decodable", len(pairs) - len(broken), ()),
        ("not decodable", len(broken), broken),
        ("silent (digital zero)", *_counted(of(lambda fact: fact.silent))),
        (f"shorter than {SHORT_SECONDS:g} s", *_counted(of(lambda fact: fact.seconds < SHORT_SECONDS - 0.01))),
        ("same content as another", *_counted(of(lambda fact: digests[fact.digest] > 1))),
        *((f"boxes {what}", count, ()) for what, count in problems.items()),
        *((f"also in test set {tested}", len(ids), ids) for tested, ids in overlap.items()),
    ]
    lines = [f"{name}", "", *(f"{what:32} {count:>9,}   {first_ids(ids)}".rstrip() for what, count, ids in rows)]
    return "\n".join([*lines, "", *(fact.error for fact in facts if fact.error)]).rstrip()


def _counted(ids: list[str]) -> tuple[int, list[str]]:
    return len(ids), ids
