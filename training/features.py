"""Features of a frozen image encoder, computed once and kept on disk for every later epoch and run.

A store is a folder of `cache_folder("features")`, one for each trunk (its name, for networks that differ in more than
their weights, and the sha256 of these), size of images, and augmentation. In it is a row of fp16 for each view of each
image file, found by the file's path, size and time of change, or by its contents; so a row that is there was computed
by this very network and from this file. Rows are marked as done only after they are on disk: a run that was killed
continues, and so does another one with the same images.
C channels, h x w tokens, N images, V views.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pooch
import torch
from filelock import FileLock
from torch.utils.data import Dataset
from tqdm import tqdm

from annotations import frames_in, middle_frame
from dataset import Pair, Pixels, TrainingPairs, make_loader
from distributed import barrier, hidden_bar, is_main, shard
from resnet import Encoder, weights_digest
from sets import count_undecodable
from transforms import augmentation, load_image, resize_whole
from utils import (
    Undecodable,
    UserError,
    as_user_error,
    cache_folder,
    evaluation_mode,
    on_disk,
    reserve,
    write_json,
    writing,
)

KEY_BYTES = 32
BATCH = 32  # images that go through the trunk at once
FLUSHED = 512  # rows that are computed before they are marked as done
STANDARDISED = 512  # images from which mean and deviation are taken, at most
LARGEST = 65504  # of fp16


# ---------------------------------------------------------------- a store


class Store:
    """Rows of fp16 by key: files `keys` (32 bytes each, in the order of the rows), `rows` and `done` (a byte each)."""

    def __init__(self, about: Mapping[str, Any], shape: Sequence[int]) -> None:
        """about: what all rows have in common, written into about.json; shape: of a row."""
        self.about, self.shape = {**about, "shape": [*shape]}, tuple(shape)
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = cache_folder("features") / name
        self.row_bytes = 2 * int(np.prod(shape))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Of all processes with this name, one at a time; another one waits."""
        lock = FileLock(self.folder / f"lock_{name}")
        try:
            lock.acquire(timeout=1)
        except TimeoutError:
            print(f"another process computes features in {self.folder}: waiting for it", flush=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            print(f"{self.folder} cannot be locked ({error}): let no other run compute features there meanwhile")
        try:
            yield
        finally:
            lock.release()

    def add(self, keys: Sequence[bytes]) -> None:
        """Make room for those keys that have no row. UserError where the disk has not. The store must be locked."""
        write_json(self.folder / "about.json", self.about)
        known = self._keys()
        new = [key for key in dict.fromkeys(keys) if key not in known]
        needed, free = len(new) * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise UserError(
                f"the features of {len(new)} views take {needed / 2**30:.1f} GiB, and {self.folder} has "
                f"{free / 2**30:.1f} free: lower --cached_views (0: compute them in every epoch), or set CACHE_ROOT"
            )
        self._forget(len(known))
        for name, size in (("rows", self.row_bytes), ("done", 1)):
            reserve(self.folder / name, (len(known) + len(new)) * size)
        with writing(self.folder / "keys"), open(self.folder / "keys", "ab") as file:
            file.truncate(KEY_BYTES * len(known))  # a kill may have left half a key
            file.seek(0, os.SEEK_END)
            file.write(b"".join(new))  # last: there is room for every row that has a key

    def _forget(self, keys: int) -> None:
        """Marks of rows that are not there any more, or have no key: a file was cut off, or copied in part."""
        rows, done = self.folder / "rows", self.folder / "done"
        whole = min(keys, rows.stat().st_size // self.row_bytes if rows.is_file() else 0)
        if done.is_file() and done.stat().st_size > whole:
            with writing(done):
                os.truncate(done, whole)

    def _keys(self) -> dict[bytes, int]:
        path = self.folder / "keys"
        content = path.read_bytes() if path.is_file() else b""
        whole = len(content) // KEY_BYTES * KEY_BYTES
        return {content[i : i + KEY_BYTES]: i // KEY_BYTES for i in range(0, whole, KEY_BYTES)}

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """The rows of keys, (len(keys),). UserError where one has none."""
        known = self._keys()
        try:
            return np.array([known[key] for key in keys], dtype=np.int64)
        except KeyError:
            raise UserError(
                f"{self.folder} lacks features that another process of this run has: CACHE_ROOT must be a folder that "
                "all of them share"
            ) from None

    def open(self, mode: str = "r") -> tuple[np.memmap, np.memmap]:
        """rows (N, *shape) and done (N,), mapped into memory."""
        rows = np.memmap(self.folder / "rows", np.float16, mode)
        return rows.reshape(-1, *self.shape), np.memmap(self.folder / "done", np.uint8, mode)


def view_key(path: str, view: int, by_contents: bool) -> bytes:
    """What finds the row of a view of a file: the file's absolute path, size and time of change, or its contents."""
    if by_contents:
        with on_disk(path) as there:
            what = pooch.file_hash(there)  # sha256
    else:
        status = os.stat(path)
        what = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(f"{what}\0{view}".encode()).digest()


# ---------------------------------------------------------------- the views of a set


class CachedViews:
    """Features (C, h, w) in fp16 of the views of a set's images, read from the store."""

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        """rows: (N, V), where in the store they are."""
        self.store, self.rows, self.mapped = store, rows, None

    @property
    def count(self) -> int:
        return self.rows.shape[1]

    def get(self, index: int, view: int) -> torch.Tensor:
        if self.mapped is None:  # each data-loading worker opens it anew
            self.mapped, _ = self.store.open()
        return torch.from_numpy(np.array(self.mapped[self.rows[index, view]]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mapped": None}


def frame_of(pair: Pair, view: int) -> str:
    """The image file of a view; of a folder of frames the middle one, then others that its id draws."""
    frames = frames_in(pair.image) if view and os.path.isdir(pair.image) else []
    return frames[zlib.crc32(f"{pair.id} {view}".encode()) % len(frames)] if frames else middle_frame(pair.image)


class ViewImages(Dataset):
    """`Pixels` of views: the whole image for view 0, as in evaluation, else one that the image and the view's number
    draw: the same whatever the file is called, wherever it lies and whenever it was written."""

    def __init__(self, views: Sequence[tuple[Pair, int]], image_size: int, augment: str) -> None:
        self.views, self.image_size, self.draw = views, image_size, augmentation(image_size, augment)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        pair, view = self.views[index]
        with torch.random.fork_rng(devices=[]), as_user_error(ValueError, kind=Undecodable):
            pair = pair.fetched()
            if view == 0:
                return Pixels(torch.from_numpy(resize_whole(load_image(frame_of(pair, 0)), self.image_size))), index
            image = load_image(frame_of(pair, view), 2 * self.image_size)
            torch.default_generator.manual_seed(zlib.crc32(image.tobytes(), view))
            return Pixels(torch.from_numpy(self.draw(image))), index


def cache_features(
    encoder: Encoder,
    sets: Sequence[tuple[TrainingPairs, int]],
    device: torch.device,
    workers: int,
    by_contents: bool = False,
) -> str:
    """Give each set the features of that many views of its images, computed where they are missing -> a line on it.

    Several processes share the work; all must see the same folder. UserError for an image that cannot be decoded, for
    features that fp16 cannot hold, and where the disk has too little room.
    """
    size, augment = sets[0][0].image_size, sets[0][0].augment
    with torch.no_grad():
        shape = trunk_features(encoder, torch.zeros(1, 3, size, size), device).shape[1:]
    about = {"encoder": encoder.name, "weights": weights_digest(encoder.trunk_state())}
    about |= {"token_shift": encoder.token_shift, "image_size": size, "augment": augment}
    store = Store(about, shape)
    store.folder.mkdir(parents=True, exist_ok=True)
    of_sets = [_views_of(pairs.pairs, count, by_contents) for pairs, count in sets]
    views = [view for of_set in of_sets for view in of_set]
    keys, computed = [key for *_, key in views], 0
    if is_main():
        with store.locked("rows"):
            store.add(keys)
        # runs with the same images wait for each other; those with others may compute a shared row twice, alike
        with store.locked(hashlib.sha256(b"".join(sorted({*keys}))).hexdigest()[:12]):
            computed = _share(encoder, store, views, size, augment, device, workers)
    else:
        computed = _share(encoder, store, views, size, augment, device, workers)
    for (pairs, count), of_set in zip(sets, of_sets, strict=True):
        pairs.views = CachedViews(store, store.find([key for *_, key in of_set]).reshape(-1, count))
    gib = len(views) * store.row_bytes / 2**30
    return f"image features: {len(views)} views, {gib:.2f} GiB in {store.folder}; {computed} of them computed now"


def _views_of(pairs: Sequence[Pair], count: int, by_contents: bool) -> list[tuple[Pair, int, bytes]]:
    views = []
    for pair in pairs:
        there = pair.fetched()
        own = by_contents or there is not pair  # the path of an image in a shard says nothing, its contents do
        views += [(pair, view, view_key(frame_of(there, view), view, own)) for view in range(count)]
    return views


def _share(
    encoder: Encoder, store: Store, views: Sequence, size: int, augment: str, device: torch.device, workers: int
) -> int:
    """Compute what is missing, this process's share of it -> how many rows all processes have computed."""
    barrier()  # the first process has made room
    _, done = store.open()
    rows = store.find([key for *_, key in views])
    first = dict(zip(rows.tolist(), views, strict=True))  # of a file that is in several pairs, one
    missing = [(row, view) for row, view in first.items() if not done[row]]
    barrier()  # everybody has looked before anybody marks a row
    compute(encoder, store, shard(missing), size, augment, device, workers)
    barrier()
    return len(missing)


@torch.no_grad()
def compute(
    encoder: Encoder,
    store: Store,
    missing: Sequence[tuple[int, tuple[Pair, int, bytes]]],
    size: int,
    augment: str,
    device: torch.device,
    workers: int,
) -> None:
    """Write the rows of (row, view), in fp32 and evaluation mode up to their rounding, and mark them as done."""
    if not missing:
        return
    rows, done = store.open("r+")
    images = ViewImages([view[:2] for _, view in missing], size, augment)
    pairs, written = [pair for _, (pair, *_) in missing], []
    title = "features of the frozen image encoder"
    with (
        evaluation_mode(encoder),
        count_undecodable(pairs, workers),
        tqdm(total=len(missing), desc=title, leave=False, unit="image", disable=hidden_bar()) as bar,
    ):
        for image, indices in make_loader(images, BATCH, workers, device=device):
            features = trunk_features(encoder, image, device).cpu()
            for values, index in zip(features, indices.tolist(), strict=True):
                row, (pair, *_) = missing[index]
                if not values.abs().max() <= LARGEST:
                    raise UserError(f"{pair.image}: a feature is not finite or above what fp16 holds: --cached_views 0")
                rows[row] = values.half().numpy()
                written.append(row)
            if len(written) >= FLUSHED:
                rows.flush()
                done[written], written = 1, []
            bar.update(len(image))
    rows.flush()
    done[written] = 1
    done.flush()


def trunk_features(encoder: Encoder, image: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images (B, 3, H, W) -> features (B, C, h, w) on the device, in the memory format of training."""
    return encoder.trunk(image.to(device).contiguous(memory_format=torch.channels_last))


# ---------------------------------------------------------------- mean and deviation of the channels


@torch.no_grad()
def standardise(encoder: Encoder, train: TrainingPairs, device: torch.device, images: int = STANDARDISED) -> None:
    """Fit the encoder's standardisation to so many training images, spread over all; every process takes the same."""
    if encoder.standardise is None:
        return
    chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), images)).astype(int)).tolist()
    if train.views is not None:
        parts = (chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH))
        return encoder.standardise.fit(torch.stack([train.views.get(i, 0) for i in part]).to(device) for part in parts)
    views = ViewImages([(train.pairs[i], 0) for i in chosen], train.image_size, "none")
    with evaluation_mode(encoder), count_undecodable(train.pairs):
        loader = make_loader(views, BATCH, 0, device=device)
        encoder.standardise.fit(trunk_features(encoder, image, device) for image, _ in loader)
