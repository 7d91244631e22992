"""VGG-Sound, Flickr-SoundNet, the built-in synthetic data and the user's own pairs: lists, annotations, transforms.

An id names one pair. H x W image, F bins, L frames; ground truth is a (224, 224) map in 0..1.
"""

import atexit
import json
import multiprocessing.queues
import os
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from annotations import (
    FILM_SUFFIXES,
    GroundTruth,
    box_map,
    consensus_map,
    first_ids,
    frames_in,
    hint,
    index_folder,
    load_boxes,
    load_frames,
    load_names,
    mask_map,
    middle_frame,
    other_names,
    own_name,
    pixel_map,
    read_ids,
    read_labels,
    read_silent_pairs,
    read_text,
)
from audio_io import (
    N_BINS,
    Heard,
    Sound,
    as_float,
    clip_of,
    collate_heard,
    cut,
    draw_silence,
    load_heard,
    load_sound,
    num_frames,
    num_samples,
    spectrograms_of,
    with_noise,
)
from maps import MAP_SIZE
from transforms import augmentation, draw_bands, load_image, normalise, resize_whole, same_image
from utils import Absent, Undecodable, UserError, as_user_error, end_workers, lacking_shared_memory

CPU = torch.device("cpu")


class Sample(NamedTuple):
    """One item of every data set."""

    image: torch.Tensor  # (3, H, W) float32, ImageNet-normalised; or features (C, h, w) of it, float16
    spectrogram: torch.Tensor  # (1, F, L) float32, log power / 12
    truth: torch.Tensor  # (224, 224) float32 in 0..1; empty (0,) in training
    id: str
    class_name: str  # empty where unknown


class Pair(NamedTuple):
    id: str
    image: str | tuple[str, ...]  # path of the image file, or of a folder of frames; several stand side by side
    audio: str | tuple[str, ...]  # path of the audio file; several sound at once

    def fetched(self) -> "Pair":
        """The pair with paths that decoders can read; those of pairs in shards are `utils.Contents`."""
        return self


class SetRow(NamedTuple):
    """Where a set's pairs, ids and annotations come from."""

    layout: str  # key of LAYOUTS
    root: str  # environment variable of the data's root, or the built-in data's folder
    ids: str | None = None  # list of ids; None: every id of the annotation, or every pair found
    annotation: str | None = None  # its file or folder, where it is not given on the command line
    expected: int | None = None  # published number of pairs
    kind: str = "boxes"  # of the annotation: boxes (VGG-SS JSON), xml (Flickr), pixels (boxes of 224 px) or masks
    val_ids: str | None = None  # list of held-out training ids
    silent: str | None = None  # list of further pairs, whose image does not show the source
    lists_in_root: bool = False  # lists and annotation are in the data's root, not in metadata/
    interactive: bool = False  # images with several sources, whose entries share the id up to the last underscore
    class_in_id: bool = False  # what follows the last underscore of an id is the class of its sound
    labels: str | None = None  # VGGSounder's list: only pairs whose class can be seen and heard, and all their classes


PLAIN = (("frames", "audio"), ("images", "audio"))
FLICKR = (*PLAIN, ("Data", "Data"), ("frames_250", "audio_250"), ("frames", "mp3"), ("images", "mp3"))
LAYOUTS = {  # pairs of folders (images, audio): all that exist below the root are searched, the first wins
    "vggsound": (*PLAIN, ("VGGSound_img", "VGGSound_aud")),
    "vggsound_extended": (*PLAIN, ("VGGSound_img", "VGGSound_aud"), ("extend_frames", "extend_audio")),
    "flickr": FLICKR,
    "flickr_extended": (*FLICKR, ("extend_frames", "extend_audio")),
    "music": PLAIN,
    "is3": (("images", "audio_wav"), ("visual_frames", "audio_wav")),
    "vpo_ss": (("images", "audio_wav"), ("visual_frames", "audio_wav"), ("COCO_AV/visual_frames", "COCO_AV/audio_wav")),
    "vpo_ms": (
        ("images", "audio_wav"), ("visual_frames", "audio_wav"), ("COCO_AV_MS/visual_frames", "COCO_AV_MS/audio_wav"),
    ),
}  # fmt: skip
MASK_FOLDERS = ("gt_masks", "gray_masks")  # beside the folder of images

_vggsound, _flickr = partial(SetRow, "vggsound", "VGGSOUND_ROOT"), partial(SetRow, "flickr", "FLICKR_ROOT")
_built_in = partial(SetRow, "vggsound", "data/synthetic", lists_in_root=True)
_is3 = partial(SetRow, "is3", "IS3_ROOT", None, interactive=True, class_in_id=True)
_photographs = partial(SetRow, "vggsound", "data/photographs", lists_in_root=True)  # experiments/photographs.py
TRAIN_SETS = {
    "vggss": _vggsound(),
    "vggss_10k": _vggsound("vggss_10k.txt", expected=10_000),
    "vggss_144k": _vggsound("vggss_144k.txt", expected=144_000),
    "vggss_heard": _vggsound("vggss_heard.txt", expected=59_468),
    "flickr": _flickr(),
    "flickr_10k": _flickr("flickr_10k.txt", expected=10_000),
    "flickr_144k": _flickr("flickr_144k.txt", expected=144_000),
    "synthetic": _built_in("train.txt", val_ids="val.txt"),
    "photographs": _photographs("train.txt", val_ids="val.txt"),
    "custom": SetRow("vggsound", "CUSTOM_ROOT"),
}

TEST_SETS = {
    "vggss": _vggsound(None, "vggss.json", 5_158),
    "vggss_heard": _vggsound("vggss_heard_test.csv", "vggss.json", 2_564),
    "vggss_unheard": _vggsound("vggss_unheard_test.csv", "vggss.json", 2_575),
    "vggss_clean": _vggsound(None, "vggss.json", labels="vggsounder.csv"),
    "vggss_plus_silent": SetRow(
        "vggsound_extended", "VGGSOUND_ROOT", None, "vggss.json", 10_316, silent="vggss_test_plus_silent.csv"
    ),
    "flickr": _flickr("flickr_test.csv", "Annotations", 250, "xml"),
    "flickr_plus_silent": SetRow(
        "flickr_extended", "FLICKR_ROOT", "flickr_test.csv", "Annotations", 500, "xml",
        silent="flickr_test_plus_silent.csv",
    ),
    "is3": _is3("synthetic3240_bbox.json", 6_480, "pixels"),
    "is3_seg": _is3("synthetic3240_seg.json", 6_480, "masks"),
    "vpo_ss": SetRow("vpo_ss", "VPO_ROOT", None, "vpo_ss_bbox.json", 890, "pixels"),
    "vpo_ss_seg": SetRow("vpo_ss", "VPO_ROOT", None, "vpo_ss_seg.json", 890, "masks"),
    "vpo_ms": SetRow("vpo_ms", "VPO_ROOT", None, "vpo_ms_bbox.json", 2_157, "pixels", interactive=True),
    "vpo_ms_seg": SetRow("vpo_ms", "VPO_ROOT", None, "vpo_ms_seg.json", 2_157, "masks", interactive=True),
    "synthetic": _built_in("test.txt", "test.json"),
    "synthetic_distractor": _built_in("distractor.txt", "distractor.json"),
    "synthetic_interactive": _built_in("interactive.txt", "interactive.json", interactive=True),
    "synthetic_offscreen": _built_in("offscreen.txt", "offscreen.json"),
    "photographs": _photographs("test.txt", "test.json"),
    "photographs_val": _photographs("val.txt", "val.json"),
    "photographs_distractor": _photographs("distractor.txt", "distractor.json"),
    "photographs_interactive": _photographs("interactive.txt", "interactive.json", interactive=True),
    "photographs_offscreen": _photographs("offscreen.txt", "offscreen.json"),
    "photographs_unseen": _photographs("unseen.txt", "unseen.json"),
    "photographs_unseen_distractor": _photographs("unseen_distractor.txt", "unseen_distractor.json"),
    "custom": SetRow("vggsound", "CUSTOM_ROOT"),
}  # fmt: skip


# ---------------------------------------------------------------- ids and files


def data_root(row: SetRow, given: str | Path | None, flag: str) -> Path:
    """The root given by the flag, else the row's own. Raises UserError when there is none."""
    if not given and row.root.endswith("_ROOT"):
        given = os.environ.get(row.root)
        if not given:
            raise Absent(f"where are the data? Give their root as {flag}, or set {row.root}=/path/to/data/")
    root = Path(given or row.root)
    if not root.is_dir():
        maker = "-m experiments.photographs" if row.root.endswith("photographs") else "prepare_data.py synthetic"
        mend = f"set {row.root}" if row.root.endswith("_ROOT") else f"python {maker} makes it"
        raise Absent(f"the data folder {root} does not exist: {mend}, or give another as {flag}")
    return root


def folders_to(root: Path, depth: int) -> Iterator[Path]:
    """The root and the folders in it, level by level, each level sorted; no hidden ones, no links."""
    level = [root]
    for _ in range(depth):
        yield from level
        below = [entry for folder in level for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        level = sorted(Path(entry.path) for entry in below if not entry.name.startswith("."))


def folders_there(root: Path, layout: str) -> list[tuple[Path, Path]]:
    """The layout's pairs of folders that exist in the root or, as released archives unpack, up to two levels below.

    Raises UserError when there are none.
    """
    for place in folders_to(root, 3):
        there = [(place / images, place / audio) for images, audio in LAYOUTS[layout]]
        there = [(images, audio) for images, audio in there if images.is_dir() and audio.is_dir()]
        if there:
            return there
    raise Absent(f"{root} has no folders {_wanted(layout)}")


def _wanted(layout: str) -> str:
    return " or ".join(f"{frames}/ and {audio}/" for frames, audio in LAYOUTS[layout])


class FilesFound(NamedTuple):
    """{id: path} below a root, and names of files that are neither an image nor audio."""

    images: dict[str, str]
    audio: dict[str, str]
    others: list[str]


def find_files(root: Path, layout: str) -> FilesFound:
    """The files in the layout's folders. Raises UserError when there are no such folders."""
    images: dict[str, str] = {}
    audio: dict[str, str] = {}
    others: list[str] = []
    for image_folder, audio_folder in reversed(folders_there(root, layout)):
        found, unknown = index_folder(image_folder, "image")
        images |= found
        if image_folder == audio_folder:
            found, sounds = index_folder(audio_folder, "audio")
            others += sorted({*unknown} & {*sounds})  # each is the other's unknown
        else:
            others += unknown
            found, unknown = index_folder(audio_folder, "audio")
            others += unknown
        audio |= found
    return FilesFound(images, audio, others)


def find_pairs(
    root: Path,
    layout: str,
    ids: Sequence[str] | None,
    allow_missing: bool = False,
    sources: Mapping[str, tuple[str, str]] | None = None,
    downloaded: bool = False,
) -> tuple[list[Pair], list[str]]:
    """Pairs of `ids` (None: every id with an image or an audio file) below root, and the ids that lack one of them.

    sources: {id: (name of the image, name of the audio)} where these are not the id. A name in a downloader's form
    stands for the id that it means: the ids settle which; without ids the form alone, of `downloaded` data. Raises
    UserError when the folders are not there, nothing is found or, unless allow_missing, any is missing.
    """
    image_files, audio_files, _ = find_files(root, layout)
    if ids is None:
        image_files = _renamed(image_files, audio_files, downloaded)
        audio_files = _renamed(audio_files, image_files, downloaded)
        ids = sorted(image_files.keys() | audio_files.keys())
    pairs, missing = _match(ids, sources or {}, image_files, audio_files)
    if missing:  # only then: it costs a look at every name
        image_files = other_names(image_files) | image_files
        audio_files = other_names(audio_files) | audio_files
        pairs, missing = _match(ids, sources or {}, image_files, audio_files)
    where = f"{_wanted(layout)} below {root}"
    if missing and not allow_missing:
        raise UserError(
            f"{len(missing)} of {len(ids)} pairs lack their image or audio in {where}: "
            f"{first_ids(missing)} (--allow_missing true continues without them and counts them)"
            f"{hint(missing, image_files.keys() | audio_files.keys())}"
        )
    if not pairs:
        sought = f"; looked for {first_ids(missing, 2)}" if missing else ""
        there = f"{len(image_files)} images and {len(audio_files)} audio files"
        raise Absent(f"none of the {there} in {where} is a pair of this set{sought}{hint(missing, image_files)}")
    return pairs, missing


def _renamed(files: Mapping[str, str], partners: Mapping[str, str], downloaded: bool) -> dict[str, str]:
    """Files by the id that their name means without doubt: `own_name` of downloads.

    Other names stay, but that of Flickr-SoundNet's kind, `<id>.mp4`, whose partner is called `<id>`.
    """
    found: dict[str, str] = {}
    for name, path in files.items():
        stem, suffix = os.path.splitext(name)
        released = suffix.lower() in FILM_SUFFIXES and name not in partners and stem in partners
        meant = own_name(name) if downloaded else stem if released else name
        found[name if meant in files or meant in found else meant] = path
    return found


def _match(
    ids: Sequence[str], sources: Mapping[str, tuple[str, str]], images: Mapping[str, str], audio: Mapping[str, str]
) -> tuple[list[Pair], list[str]]:
    pairs, missing = [], []
    for i in ids:
        image, sound = sources.get(i, (i, i))
        if image in images and sound in audio:
            pairs.append(Pair(i, images[image], audio[sound]))
        else:
            missing.append(i)
    return pairs, missing


# ---------------------------------------------------------------- what workers send, and what becomes of it


class Pixels(NamedTuple):
    """An image, or a batch of them, until `finish` normalises it."""

    levels: torch.Tensor  # (H, W, 3) uint8


def collate(items: Sequence) -> Any:
    """Items -> a batch, as torch's `default_collate` makes it; clips of several types are brought to one."""
    return collate_by_type(items, collate_fn_map={Heard: collate_heard, **default_collate_fn_map})


def finish(batch: Any, device: torch.device) -> Any:
    """A batch with its `Pixels` normalised and its clips as log spectrograms, computed on the device.

    Pixels -> (B, 3, H, W); a tuple of n `Heard` -> (B, n, F, L). Everything else stays as it is and where it is.
    """
    if isinstance(batch, Pixels):
        return normalise(batch.levels.to(device, non_blocking=True))
    if _is_audio(batch):
        found = [spectrograms_of(heard, device) for heard in batch]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]
    return _rebuilt(batch, [finish(part, device) for part in batch]) if isinstance(batch, tuple | list) else batch


def finish_one(item: Any) -> Any:
    """The same of an item that is not in a batch, on the CPU."""
    if isinstance(item, Pixels):
        return finish(Pixels(item.levels[None]), CPU)[0]
    if _is_audio(item):
        return finish(tuple(Heard(*(part[None] for part in heard)) for heard in item), CPU)[0]
    return _rebuilt(item, [finish_one(part) for part in item]) if isinstance(item, tuple) else item


def bytes_of(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    return sum(map(bytes_of, batch)) if isinstance(batch, tuple | list) else 0


def _is_audio(value: Any) -> bool:
    return isinstance(value, tuple | list) and bool(value) and all(isinstance(part, Heard) for part in value)


def _rebuilt(value: tuple | list, parts: list) -> tuple | list:
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


# ---------------------------------------------------------------- data sets


TRAIN_POSITIONS = 0.4, 0.6  # where in the slack of a clip training cuts
NOT_READ = np.empty((0, 0, 3), np.uint8)  # in place of an image of which only features are needed


class Decoded(NamedTuple):
    """What a pair's files hold, before anything is drawn at random."""

    image: np.ndarray  # (H, W, 3) uint8
    sound: Sound


class DecodedPairs(Dataset):
    """Pairs whose files are decoded every time, or once where `store` keeps what they held (training/decoded.py).

    An item is a finished `Sample`; what workers send of it, `raw`, is a `Sample` of bytes: see `transforms.finish`.
    """

    pairs: Sequence[Pair]
    audio_seconds: float
    store: Any = None  # get(index) -> Decoded, or None where nothing is kept; put(index, decoded)
    loader: "Loader | None" = None  # whose workers are kept: see `make_loader`

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        return finish_one(self.raw(index))

    def raw(self, index: int) -> Sample:
        """The item with `Pixels` (or kept features) as its image and a tuple of `Heard` in place of the spectrogram."""
        raise NotImplementedError

    def heard(self, index: int) -> tuple[Heard]:
        """A pair's audio alone, cut from the middle. Raises Undecodable, naming the file."""
        with as_user_error(ValueError, kind=Undecodable):
            if self.store:
                sound = self.decoded(index).sound
            else:
                sound = load_sound(self.pairs[index].fetched().audio, self.audio_seconds)
        return (Heard(clip_of(sound, self.audio_seconds)),)

    def decoded(self, index: int) -> Decoded:
        """Raises Undecodable, naming the file."""
        store = (
            None if any(map(os.path.isdir, files_of(self.pairs[index].image))) else self.store
        )  # each epoch draws another frame
        kept = store and store.get(index)
        if kept is None:
            with as_user_error(ValueError, kind=Undecodable):
                kept = self._decode(self.pairs[index])
            if store:
                store.put(index, kept)
        return kept

    def _decode(self, pair: Pair) -> Decoded:
        raise NotImplementedError


def decode_for_evaluation(pair: Pair, image_size: int, audio_seconds: float, at: float | None = None) -> Decoded:
    """The whole image resized, each of several as large as one; the middle of the audio, or around second `at`."""
    pair = pair.fetched()
    images = [resize_whole(load_image(middle_frame(path)), image_size) for path in files_of(pair.image)]
    return Decoded(images[0] if len(images) == 1 else np.hstack(images), load_heard(pair.audio, audio_seconds, at))


def files_of(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    """One path or several, of a pair."""
    return (paths,) if isinstance(paths, str) else paths


class TrainingPairs(DecodedPairs):
    """Augmented pairs. Random choices depend on (seed, epoch, index) alone, not on workers or order.

    augment: "hard", "plain" or "none" (held-out pairs: as in evaluation). silence: spectrograms are (2, F, L), the
    second of silence or noise. Where `views` holds features of a frozen encoder (training/features.py), one of an
    image's views stands in the place of the image, (C, h, w) in fp16.
    """

    views: Any = None  # count: views of each image; get(index, view) -> features

    def __init__(
        self,
        pairs: Sequence[Pair],
        image_size: int,
        audio_seconds: float,
        augment: str = "hard",
        seed: int = 0,
        silence: bool = False,
    ) -> None:
        self.pairs, self.audio_seconds, self.augment, self.seed, self.epoch = pairs, audio_seconds, augment, seed, 0
        self.image_size, self.silence = image_size, silence
        self.draw_image = augmentation(image_size, augment)

    def _decode(self, pair: Pair) -> Decoded:
        pair = pair.fetched()
        if self.views:
            positions = (0.5, 0.5) if self.augment == "none" else TRAIN_POSITIONS
            return Decoded(NOT_READ, load_sound(pair.audio, self.audio_seconds, positions))
        if self.augment == "none":
            return decode_for_evaluation(pair, self.image_size, self.audio_seconds)
        image = np.array(load_image(self._frame(pair), 2 * self.image_size))
        return Decoded(image, load_sound(pair.audio, self.audio_seconds, TRAIN_POSITIONS))

    def batches(self, batch_size: int, lanes: tuple[int, int]) -> list[list[int]]:
        """Every full batch of the epoch; lanes: processes and data-loading workers, which change nothing here."""
        return training_batches(len(self), batch_size, self.seed, self.epoch)

    def _frame(self, pair: Pair) -> str:
        """The image file; of a folder of frames one that depends on seed, epoch and id alone."""
        if not os.path.isdir(pair.image):
            return pair.image
        frames = frames_in(pair.image) or [middle_frame(pair.image)]
        draw = np.random.SeedSequence([self.seed, self.epoch, zlib.crc32(pair.id.encode())]).generate_state(1)[0]
        return frames[draw % len(frames)]

    def raw(self, index: int) -> Sample:
        pair, (image, sound) = self.pairs[index], self.decoded(index)
        if self.augment == "none":
            heard = (Heard(clip_of(sound, self.audio_seconds)),)
            seen = self.views.get(index, 0) if self.views else Pixels(torch.from_numpy(image))
            return Sample(seen, heard, torch.empty(0), pair.id, "")
        draw = int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw)  # torch.manual_seed would reseed CUDA as well
            clip = clip_of(sound, self.audio_seconds, 0.4 + 0.2 * float(torch.rand(())))
            sizes = N_BINS, num_frames(self.audio_seconds)
            heard = [Heard(clip, draw_bands(*sizes)) if self.augment == "hard" else Heard(clip)]
            if self.views:
                seen = self.views.get(index, int(torch.randint(self.views.count, ())))
            else:
                seen = Pixels(torch.from_numpy(self.draw_image(image)))
            if self.silence:  # last, so that it changes no other random choice
                heard.append(Heard(draw_silence(self.audio_seconds)))
        return Sample(seen, tuple(heard), torch.empty(0), pair.id, "")


class EvaluationPairs(DecodedPairs):
    """Pairs with their ground truth; missing: ids of the set that are not among them."""

    at: Mapping[str, float] = {}  # id: the second of its audio around which is heard, in place of the middle
    alone: Mapping[str, str] = {}  # id: the audio of its source alone, where the pair's is a mixture
    snr: float | None = None  # dB of the noise that is added to all audio

    def __init__(
        self,
        pairs: Sequence[Pair],
        ground_truth: GroundTruth,
        missing: Sequence[str],
        image_size: int,
        audio_seconds: float,
    ) -> None:
        self.pairs, self.ground_truth, self.missing, self.audio_seconds = pairs, ground_truth, missing, audio_seconds
        self.image_size = image_size
        self.class_names = [ground_truth.class_of.get(pair.id, "") for pair in pairs]

    def without(self, broken: Mapping[str, str]) -> "EvaluationPairs":
        """The same set without the pairs of {id: reason}, which join the missing ones. UserError when none is left."""
        pairs = [pair for pair in self.pairs if pair.id not in broken]
        if not pairs:
            raise UserError(f"no pair of {self.ground_truth.name} can be decoded: {next(iter(broken.values()))}")
        fewer = EvaluationPairs(pairs, self.ground_truth, [*self.missing, *broken], self.image_size, self.audio_seconds)
        fewer.at, fewer.alone, fewer.snr = self.at, self.alone, self.snr
        return fewer

    def noisy(self, snr: float) -> "EvaluationPairs":
        """The same set with white noise in all audio, `snr` dB below it. UserError where there is no waveform."""
        stored = [pair.id for pair in self.pairs if any(path.endswith(".npy") for path in files_of(pair.audio))]
        if stored:
            raise UserError(
                f"noise needs waveforms: the audio of {len(stored)} of {len(self.pairs)} pairs of "
                f"{self.ground_truth.name} is a stored spectrogram (.npy): {first_ids(stored)}"
            )
        other = copy(self)
        other.snr = snr
        return other

    def _decode(self, pair: Pair) -> Decoded:
        return decode_for_evaluation(pair, self.image_size, self.audio_seconds, self.at.get(pair.id))

    def sound(self, index: int) -> Sound:
        """A pair's audio as it is heard, with noise where the set has some."""
        pair = self.pairs[index]
        with as_user_error(ValueError, kind=Undecodable):
            kept = self.decoded(index).sound if self.store else None
            sound = kept or load_heard(pair.audio, self.audio_seconds, self.at.get(pair.id))
            return self._noisy(sound, pair.audio)

    def _noisy(self, sound: Sound, path: str | tuple[str, ...]) -> Sound:
        return sound if self.snr is None else with_noise(sound, path, self.audio_seconds, self.snr)

    def heard(self, index: int) -> tuple[Heard]:
        return (Heard(clip_of(self.sound(index), self.audio_seconds)),)

    def heard_alone(self, index: int) -> tuple[Heard]:
        """Of the pair's own source without the others, where `alone` knows it."""
        path = self.alone[self.pairs[index].id]
        with as_user_error(ValueError, kind=Undecodable):
            sound = self._noisy(load_heard(path, self.audio_seconds), path)
        return (Heard(clip_of(sound, self.audio_seconds)),)

    def waveform(self, name: str) -> np.ndarray | None:
        """What is heard with an id: (samples,) in -1..1 at 16 kHz; None of a stored spectrogram."""
        index = next(i for i, pair in enumerate(self.pairs) if pair.id == name)
        if any(path.endswith(".npy") for path in files_of(self.pairs[index].audio)):
            return None
        return as_float(cut(self.sound(index), num_samples(self.audio_seconds)))

    def raw(self, index: int) -> Sample:
        pair, (image, sound) = self.pairs[index], self.decoded(index)
        with as_user_error(ValueError, kind=Undecodable):
            heard = (Heard(clip_of(self._noisy(sound, pair.audio), self.audio_seconds)),)
        truth = self.ground_truth.truth_of(pair.id)
        return Sample(Pixels(torch.from_numpy(image)), heard, truth, pair.id, self.class_names[index])


class Selection(NamedTuple):
    """The pairs of a training set, and the ids whose files are missing."""

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
    downloaded = row.root in ("VGGSOUND_ROOT", "FLICKR_ROOT")
    ids = read_ids(path) if path else None
    pairs, missing = find_pairs(folder, row.layout, ids, allow_missing, downloaded=downloaded)
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
    folder = data_root(row, root, "--train_data_path")
    path, missing = val_list or _own_list(row, row.val_ids, folder, ""), []
    if path:
        held_out, missing = find_pairs(folder, row.layout, read_ids(path), allow_missing)
    else:
        order = np.random.default_rng(seed).permutation(len(pairs))
        held_out = [pairs[i] for i in sorted(order[: count_held_out(val_fraction, len(pairs))])]
    if missing:
        print(f"held-out pairs: {len(held_out)} of {len(held_out) + len(missing)} of {path}, the others are missing")
    held_ids = {pair.id for pair in held_out}
    return [pair for pair in pairs if pair.id not in held_ids], held_out


def count_held_out(fraction: float, pairs: int) -> int:
    """How many of so many pairs; two where the fraction means one, which would be retrieved whatever is learnt."""
    count = round(fraction * pairs)
    return 2 if count == 1 else count


def _own_list(row: SetRow, name: str | None, root: Path, metadata: str) -> Path | None:
    return None if name is None else (root if row.lists_in_root else Path(metadata)) / name


def build_ground_truth(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    test_list: str | None = None,
    interactive: bool | None = None,
) -> GroundTruth:
    """What a row of TEST_SETS asks for, whether its images and audio are there or not.

    test_list replaces the row's own list. interactive: whether images of a set of one's own have several sources; None:
    its annotation tells, by entries that name one image and different audio.
    """
    row = TEST_SETS[name]
    if gt_path is None and row.annotation is None:
        raise Absent(f"--testset {name} needs --test_gt_path: a JSON of {{file, class, bbox}}")
    in_root = row.lists_in_root or row.kind == "xml"
    needs_root = (in_root and not gt_path) or (row.lists_in_root and not test_list) or row.kind == "masks"
    folder = data_root(row, root, "--test_data_path") if needs_root else Path()
    annotation = Path(gt_path) if gt_path else (folder if in_root else Path(metadata)) / row.annotation
    list_path = test_list or _own_list(row, row.ids, folder, metadata)
    known, truth_of, class_of = read_annotation(row, annotation, folder)
    ids = read_ids(list_path) if list_path else list(known)
    unknown = [i for i in ids if i not in known] if known else []
    if unknown:
        raise UserError(
            f"{annotation} has no box for {len(unknown)} ids of {list_path}: {first_ids(unknown)}{hint(unknown, known)}"
        )
    silent = {i for i in ids if known.get(i) == []}  # an entry with a list of boxes that is empty
    sources, others = {}, frozenset()
    if row.annotation is None:
        named = load_names(annotation)
        sources = {i: named[i] for i in ids if i in named}
    if row.silent and not test_list:
        sources = read_silent_pairs(Path(metadata) / row.silent)
        others = frozenset(sources)
        ids, silent = [*ids, *sources], silent | others
    interactive, units, notes = _units_of(row, interactive, annotation, ids, sources, silent, class_of)
    seen = in_view(folder, ids) if row.lists_in_root else {}
    if units and not seen:
        seen = seen_together({i: units.get(i, i) for i in ids}, class_of, silent)
    truth = GroundTruth(
        name,
        ids,
        partial(_truth_or_nothing, truth_of, others),
        len(ids) if test_list else max(len(ids), row.expected or 0),
        {i: class_of[i] for i in ids if i in class_of},
        units,
        frozenset(silent),
        masks=row.kind == "masks",
        interactive=interactive,
        sources=sources,
        seen=seen,
        notes=notes,
    )
    return with_labels(truth, Path(metadata) / row.labels) if row.labels else truth


def _units_of(
    row: SetRow,
    asked: bool | None,
    annotation: Path,
    ids: Sequence[str],
    sources: Mapping[str, tuple[str, str]],
    silent: Collection[str],
    class_of: Mapping[str, str],
) -> tuple[bool, dict[str, str], list[str]]:
    """Whether images have several sources, which image an id is of where that is told, and a note where names told it.

    asked: what the user says of a set of one's own. UserError where that is wrong.
    """
    interactive = asked if row.annotation is None else row.interactive
    if interactive is None:
        interactive = bool(_several_sources(sources, silent))
    units = {i: image for i, (image, _) in sources.items()}
    if not interactive:
        return interactive, units, []
    if row.annotation is not None:
        return interactive, {i: _without_source(i, class_of.get(i, "")) for i in ids} | units, []
    units |= {i: i.rpartition("_")[0] or i if asked else i for i in ids if i not in units}
    shared = _shared_by([i for i in ids if i not in silent], units)
    if not shared:
        raise UserError(
            f"--interactive true, but no image of {annotation} has two entries: those of one image share their "
            "name up to the last underscore (dogs_1, dogs_2), or name `image` and `audio`"
        )
    by_name = sorted(shared - {units[i] for i in sources})
    if not by_name:
        return interactive, units, []
    entries = first_ids([i for i in ids if units[i] == by_name[0]], 3)
    return interactive, units, [f"{len(by_name)} images by the names of their entries, as {by_name[0]} of {entries}"]


def _without_source(name: str, class_name: str) -> str:
    """The image in the id of an entry: what stands before its class, which may have underscores, or the last one."""
    ending = f"_{class_name}"
    return name.removesuffix(ending) if class_name and name.endswith(ending) else name.rpartition("_")[0] or name


def with_labels(truth: GroundTruth, path: Path) -> GroundTruth:
    """The pairs whose class can be seen and heard by VGGSounder's list, with all their classes."""
    labels = read_labels(path)
    ids = [i for i in truth.ids if i in labels and truth.class_of[i] in labels[i].seen & labels[i].heard]
    return truth._replace(
        ids=ids,
        expected=len(ids),
        seen={i: labels[i].seen for i in ids},
        heard={i: labels[i].heard for i in ids},
        notes=[f"{len(ids):,} of {len(truth.ids):,} pairs: those whose class can be seen and heard, by {path.name}"],
    )


def seen_together(
    images: Mapping[str, str], class_of: Mapping[str, str], silent: Collection[str]
) -> dict[str, frozenset[str]]:
    """{id: classes of all sources in its image}, images: that of each id; empty where a class is not known."""
    if not all(class_of.get(i) for i in images):
        return {}
    shown: dict[str, set[str]] = {image: set() for image in images.values()}
    for i, image in images.items():
        if i not in silent:
            shown[image].add(class_of[i])
    return {i: frozenset(shown[image]) for i, image in images.items()}


def in_view(folder: Path, ids: Sequence[str]) -> dict[str, frozenset[str]]:
    """{id: kinds of all objects in its image, silent ones too}, of built-in data; empty where no file says so."""
    path = folder / "objects.json"
    if not path.is_file():
        return {}
    try:
        objects = json.loads(read_text(path, "list of objects"))
        return {i: frozenset(thing["kind"] for thing in objects[i]) for i in ids if i in objects}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path}, which names the objects in view: {error!r:.80}") from error


def _several_sources(sources: Mapping[str, tuple[str, str]], silent: Collection[str]) -> set[str]:
    """Images that entries with a source in view name with different audio."""
    heard = {names for i, names in sources.items() if i not in silent}
    count = Counter(image for image, _ in heard)
    return {image for image, entries in count.items() if entries > 1}


def _shared_by(ids: Sequence[str], units: Mapping[str, str]) -> set[str]:
    """Images of more than one of the ids."""
    count = Counter(units.get(i, i) for i in ids)
    return {image for image, entries in count.items() if entries > 1}


def read_annotation(row: SetRow, path: Path, root: Path) -> tuple[dict, Callable[[str], torch.Tensor], dict[str, str]]:
    """{id: boxes, or name of its mask}, empty where ids have a file each; id -> map (224, 224); {id: class name}."""
    if row.kind == "xml":
        if not path.is_dir():
            raise Absent(f"the folder of annotations {path} does not exist: give it as --test_gt_path")
        return {}, partial(_xml_truth, path), {}
    if row.kind == "boxes":
        entries = load_boxes(path)
        boxes = {name: drawn for name, (_, drawn) in entries.items()}
        return boxes, partial(_box_truth, boxes), {name: class_name for name, (class_name, _) in entries.items()}
    drawn = load_frames(path, masks=row.kind == "masks")
    classes = {name: name.rpartition("_")[2] for name in drawn} if row.class_in_id else {}
    if row.kind == "pixels":
        return drawn, partial(_pixel_truth, drawn), classes
    masks: dict[str, str] = {}
    for frames, _ in reversed(folders_there(root, row.layout)):
        for folder in filter(Path.is_dir, (frames.with_name(name) for name in MASK_FOLDERS)):
            masks |= index_folder(folder, "image")[0]
    return drawn, partial(_mask_truth, {name: masks.get(mask) for name, mask in drawn.items()}), classes


def build_test_set(
    name: str,
    root: str | None,
    gt_path: str | None,
    metadata: str,
    image_size: int,
    audio_seconds: float,
    test_list: str | None = None,
    allow_missing: bool = False,
    interactive: bool | None = None,
) -> EvaluationPairs:
    """A row of TEST_SETS with its images, audio and ground truth; see `build_ground_truth`."""
    row = TEST_SETS[name]
    folder = data_root(row, root, "--test_data_path")
    ground_truth = build_ground_truth(name, root, gt_path, metadata, test_list, interactive)
    pairs, missing = find_pairs(folder, row.layout, ground_truth.ids, allow_missing, ground_truth.sources)
    if row.annotation is None and ground_truth.interactive:
        check_copies(pairs, ground_truth.unit_of, ground_truth.silent)
    return EvaluationPairs(pairs, ground_truth, missing, image_size, audio_seconds)


def check_copies(pairs: Sequence[Pair], units: Mapping[str, str], silent: Collection[str]) -> None:
    """UserError where pairs of one unit show different images: `--interactive true` tells images by their names."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        other = first.setdefault(units[pair.id], pair) if pair.id not in silent else pair
        if other.image == pair.image:
            continue
        with as_user_error(ValueError):
            alike = same_image(middle_frame(other.image), middle_frame(pair.image))
        if not alike:
            raise UserError(
                f"--interactive true: {other.id} and {pair.id} would be sources of one image, "
                f"{units[pair.id]}, by their names up to the last underscore, but show different images: name `image` "
                "and `audio` of each entry"
            )


def _truth_or_nothing(truth_of: Callable, nothing: frozenset[str], name: str) -> torch.Tensor:
    return torch.zeros(MAP_SIZE, MAP_SIZE) if name in nothing else truth_of(name)


def _box_truth(boxes: dict[str, list[list[float]]], name: str) -> torch.Tensor:
    return box_map(boxes[name])


def _pixel_truth(boxes: dict[str, list[float]], name: str) -> torch.Tensor:
    return pixel_map(boxes[name])


def _xml_truth(folder: Path, name: str) -> torch.Tensor:
    return consensus_map(folder / f"{name}.xml")


def _mask_truth(files: dict[str, str | None], name: str) -> torch.Tensor:
    if files[name] is None:
        raise Undecodable(f"the mask of {name} is in none of {', '.join(MASK_FOLDERS)} beside the images")
    with as_user_error(ValueError, kind=Undecodable):
        return mask_map(files[name])


def training_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every full batch of one epoch over `count` pairs, shuffled by (seed, epoch) alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[: count - count % batch_size].view(-1, batch_size).tolist()


def in_order(count: int, batch_size: int) -> list[range]:
    """Batches of `count` items in order, the last one as large as what is left."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def make_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    batches: Sequence[Sequence[int]] | None = None,
    device: torch.device = CPU,
    keep_workers: bool = False,
) -> "Loader":
    """The given batches of indices, else all items in order. Workers draw no random numbers: see TrainingPairs.

    device: where images are normalised and spectrograms computed. keep_workers: the same workers make the batches of
    the next loader of these pairs; of what changes in them meanwhile, only `epoch` reaches the workers.
    """
    batches = in_order(len(dataset), batch_size) if batches is None else batches
    if not (keep_workers and workers):
        return Loader(dataset, workers, device).over(batches, dataset)
    if dataset.loader is None or (dataset.loader.workers, dataset.loader.device) != (workers, device):
        # of a copy: a circle would leave the end of the workers to the garbage collector, which ends their queues first
        dataset.loader = Loader(copy(dataset), workers, device, persistent=True)
    return dataset.loader.over(batches, dataset)


class Loader:
    """Batches of a data set in the order that `over` says: made of bytes by workers, finished on a device."""

    def __init__(self, dataset: Dataset, workers: int, device: torch.device, persistent: bool = False) -> None:
        self.workers, self.device, self.keys = workers, device, _Keys()
        self.batches = DataLoader(
            _Sent(dataset),
            batch_sampler=self.keys,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=_leave_stopping_to_the_run,
            generator=torch.Generator().manual_seed(0),
            pin_memory=device.type == "cuda",
            persistent_workers=persistent,
        )

    def over(self, batches: Sequence[Sequence[int]], dataset: Dataset) -> "Loader":
        """These batches, as the data set draws them in the epoch it is in."""
        self.keys.batches, self.keys.epoch = batches, getattr(dataset, "epoch", 0)
        return self

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator:
        if self.workers:
            self._check_shared_memory()
        batches = iter(self.batches)
        return (finish(batch, self.device) for batch in batches)

    def _check_shared_memory(self) -> None:
        """UserError where the batches that the workers hold ready do not fit into what is free of /dev/shm."""
        in_flight = min(len(self), self.workers * self.batches.prefetch_factor + 1)
        if not in_flight:
            return
        try:
            one = collate([self.batches.dataset[next(iter(self.keys))[0]]])
        except Undecodable:  # told when its turn comes
            return
        needed = in_flight * max(map(len, self.keys.batches)) * bytes_of(one)
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if lacking := lacking_shared_memory(needed):
            raise UserError(lacking)


class _Keys:
    """Batches of (epoch, index): the epoch travels with the index to workers that outlive it."""

    batches: Sequence[Sequence[int]] = ()
    epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(self.epoch, index) for index in batch] for batch in self.batches)


class _Sent(Dataset):
    """What workers send of a data set's items; of one that has only finished items, these."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.item = dataset, getattr(dataset, "raw", dataset.__getitem__)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        self.dataset.epoch, index = key
        return self.item(index)


def _leave_stopping_to_the_run(_: int) -> None:
    """Schedulers send SIGTERM to every process; the run finishes its step with the workers and then ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, batch: object) -> None:
    """In a worker: a batch that cannot be handed over would be dropped, and the run would wait for it for ever."""
    os.write(2, f"data-loading worker: {error}\n".encode())
    os._exit(1)


atexit.register(end_workers)
