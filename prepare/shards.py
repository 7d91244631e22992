"""Pairs in few large files: WebDataset shards for network file systems, object stores and millions of pairs.

The work of `prepare_data.py shards`. What a shard is: `shards/index.py`.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from annotations import first_ids, middle_frame
from audio_io import SAMPLE_RATE, load_audio
from dataset import TRAIN_SETS, Pair, select_training_pairs
from shards.addresses import INDEX, Files, expand, name_of, shown
from shards.index import FORMAT, key_of, scan, write_index
from transforms import load_image
from utils import UserError, add_boolean, atomic_path, number, write_text

PREFIX, DIGITS = "pairs", 6
JPEG_QUALITY = 92
PLAN = ".shards.json"  # what an unfinished folder is being made of


def add_flags(parser) -> None:
    parser.add_argument("--trainset", choices=sorted(TRAIN_SETS), default="custom", help="training set to be packed")
    parser.add_argument("--train_data_path", help="root of its data (default: the set's environment variable)")
    parser.add_argument("--train_list", help="file of training ids, one per line, in place of the set's own list")
    parser.add_argument("--metadata", default="./metadata", help="folder of the public lists")
    parser.add_argument("--out", type=Path, help="folder to write the shards and their index to")
    parser.add_argument(
        "--pairs_per_shard", type=number(int, low=1), default=1000, help="pairs in each shard; 10 s take 0.35 MB a pair"
    )
    parser.add_argument(
        "--short_side",
        type=number(int, low=32),
        help="make larger images this small, as JPEG; 256 is enough for 224 pixels (default: files as they are)",
    )
    parser.add_argument("--seed", type=number(int, low=0), default=0, help="random seed of the order in the shards")
    parser.add_argument("--workers", type=number(int, low=0), default=2, help="number of processes")
    add_boolean(parser, "--allow_missing", "leave out pairs that are missing or cannot be decoded, and name them")
    add_boolean(parser, "--overwrite", "replace shards that were made of other pairs or with other settings")
    parser.add_argument(
        "--index", metavar="SHARDS", help="write no shards, but the index of those in a folder, pattern or list"
    )


def run(args) -> None:
    if args.index:
        make_index(args.index, args.out)
    elif not args.out:
        raise UserError("say where to write: --out FOLDER")
    else:
        paths = args.train_data_path, args.metadata, args.train_list
        selection = select_training_pairs(args.trainset, *paths, args.allow_missing)
        left_out = dict.fromkeys(selection.missing, "image or audio not found")
        settings = Settings(args.pairs_per_shard, args.short_side, args.seed)
        left_out |= write_shards(selection.pairs, args.out, settings, args.workers, args.overwrite)
        tell(args.out, left_out, args.allow_missing)


class Settings(NamedTuple):
    pairs_per_shard: int
    short_side: int | None
    seed: int


# ---------------------------------------------------------------- writing


def write_shards(
    pairs: Sequence[Pair], folder: Path, settings: Settings, workers: int = 0, overwrite: bool = False
) -> dict[str, str]:
    """Write the pairs, in a random order, to shards of which each is whole or not there -> {id left out: why}.

    What was finished of the same pairs and settings is kept. The index comes last: a folder without one is unfinished.
    UserError where shards of something else are there, unless `overwrite`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = hashlib.sha256("/".join(pair.id for pair in pairs).encode()).hexdigest()
    made_of = {"format": FORMAT, "pairs": listed, **settings._asdict()}
    begun, finished = _read_json(folder / PLAN), _read_json(folder / INDEX)
    there = (begun or finished or {}).get("made_of")
    if there != made_of or (finished and overwrite):
        if (there or any(folder.glob("*.tar"))) and not overwrite:
            raise UserError(
                f"{folder} holds shards of other pairs or settings: take another folder, or --overwrite true"
            )
        for old in (INDEX, PLAN, f"{PREFIX}-*.tar", f".{PREFIX}-*.json"):
            for path in folder.glob(old):
                path.unlink()
    elif finished:
        print(f"{folder}: the shards are there already")
        return {}
    write_text(folder / PLAN, json.dumps({"made_of": made_of}))
    order = np.random.default_rng(settings.seed).permutation(len(pairs))
    parts = [order[i : i + settings.pairs_per_shard] for i in range(0, len(order), settings.pairs_per_shard)]
    job = _Written(pairs, parts, folder, settings.short_side)
    loader = DataLoader(job, batch_size=None, num_workers=min(workers, len(parts)))
    entries = [*tqdm(loader, "shards", len(parts), leave=False, unit="shard", disable=None)]
    left_out = {name: why for entry in entries for name, why in entry.pop("left_out").items()}
    entries = [entry for entry in entries if entry["pairs"]]
    if not entries:
        raise UserError(f"no pair can be decoded: {next(iter(left_out.values()))}")
    write_index(folder / INDEX, entries, made_of=made_of, left_out=left_out)
    for path in (folder / PLAN, *folder.glob(f".{PREFIX}-*.json")):
        path.unlink()
    return left_out


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: remove it, or --overwrite true in another folder ({error})") from error
    return found if isinstance(found, dict) else None


class _Written(Dataset):
    """Item i: shard i is written, or was before -> its entry of the index, with {id: why} of what was left out."""

    def __init__(
        self, pairs: Sequence[Pair], parts: Sequence[np.ndarray], folder: Path, short_side: int | None
    ) -> None:
        self.pairs, self.parts, self.folder, self.short_side = pairs, parts, folder, short_side

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path = self.folder / f"{PREFIX}-{number:0{DIGITS}}.tar"
        note = self.folder / f".{path.stem}.json"
        if (entry := _read_json(note)) and path.is_file() and path.stat().st_size == entry["bytes"]:
            return entry
        left_out = {}
        with atomic_path(path) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
                for place in self.parts[number]:
                    pair = self.pairs[place]
                    try:
                        files = packed(pair, self.short_side)
                    except ValueError as error:
                        left_out[pair.id] = " ".join(str(error).split())
                        continue
                    for suffix, content in files.items():
                        member = tarfile.TarInfo(key_of(pair.id) + suffix)  # no time, no owner: the same bytes again
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            entry = scan(str(temporary), whole=True) | {"name": path.name, "left_out": left_out}
        write_text(note, json.dumps(entry))
        return entry


def packed(pair: Pair, short_side: int | None) -> dict[str, bytes]:
    """{suffix: content} of a pair: the image, of a folder of frames the middle one, and audio as 16-kHz 16-bit WAV.

    Raises ValueError, naming the file, for what cannot be decoded and for stored spectrograms.
    """
    if pair.audio.endswith(".npy"):
        raise ValueError(f"{pair.audio} is a stored spectrogram: shards hold sound")
    path = Path(middle_frame(pair.image))
    image, content, suffix = load_image(path), path.read_bytes(), path.suffix.lower()
    if short_side and min(image.size) > short_side:
        scale = short_side / min(image.size)
        sides = [max(round(side * scale), short_side) for side in image.size]
        buffer, suffix = io.BytesIO(), ".jpg"
        image.resize(sides, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=JPEG_QUALITY)
        content = buffer.getvalue()
    levels = np.rint(load_audio(pair.audio) * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)
    heard = io.BytesIO()
    soundfile.write(heard, levels, SAMPLE_RATE, "PCM_16", format="WAV")
    return {suffix: content, ".wav": heard.getvalue()}


def tell(folder: Path, left_out: dict[str, str], allow_missing: bool) -> None:
    """One line about what is there; UserError where pairs were left out that should not be."""
    index = json.loads((folder / INDEX).read_text())
    size = sum(entry["bytes"] for entry in index["shards"]) / 1e9
    print(f"{folder}: {index['pairs']:,} pairs in {len(index['shards']):,} shards, {size:.2f} GB, and {INDEX}")
    left_out = index.get("left_out", {}) | left_out
    if not left_out:
        return
    why = f"{len(left_out)} pairs are left out: {first_ids([*left_out])}. The first: {next(iter(left_out.values()))}"
    if not allow_missing:
        raise UserError(f"{why} (--allow_missing true says that this is as it should be)")
    print(why)


# ---------------------------------------------------------------- the index of shards that are there


def make_index(path: str, out: Path | None) -> None:
    """Read shards of anybody once, local or from the web, and write their index."""
    addresses, place = expand(path)
    place = str(out) if out else place
    if place.startswith(("http://", "https://")):
        raise UserError(
            "an index cannot be written to the web: say where, --out index.json, and put it beside the shards"
        )
    target = Path(place) / INDEX if Path(place).is_dir() else Path(place)
    files = Files()
    entries = [scan(address, files, whole=True) for address in tqdm(addresses, "shards", leave=False, disable=None)]
    write_index(target, entries)
    incomplete = [name for entry in entries for name in entry["incomplete"]]
    pairs = sum(entry["pairs"] for entry in entries)
    print(f"{target}: {pairs:,} pairs in {len(entries):,} shards of {shown(path)}, {name_of(addresses[0])} the first")
    if incomplete:
        print(f"{len(incomplete)} ids lack their image or audio: {first_ids(incomplete)}")
