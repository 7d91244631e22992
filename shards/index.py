"""What shards hold: pairs, where their files begin, and a checksum of each shard.

A shard is a tar archive as the package webdataset reads and writes it: the files of a pair follow each other and share
their name up to its first dot, `KEY.jpg` and `KEY.wav`. The key is the id, with a dot in it written %2E and a percent
sign %25. `index.json` beside the shards:

    {"format": ..., "pairs": N, "shards": [{"name": ..., "pairs": ..., "bytes": ..., "sha256": ...,
      "ids": [...], "suffixes": [[".jpg", ".wav"], ...] or one for all, "files": [[at, bytes, at, bytes], ...]}, ...]}

`files` holds where the image begins in the archive and how long it is, then the same of the audio. N pairs, S shards.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from annotations import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MORE_AUDIO, MORE_IMAGES, check_id, first_ids, repeated
from shards.addresses import WEB, Files, cut_short, expand, name_of, shown
from utils import Absent, UserError, write_text

IMAGES = {*IMAGE_SUFFIXES, *MORE_IMAGES}
SOUNDS = {*AUDIO_SUFFIXES, *MORE_AUDIO} - {".npy"}
FORMAT = "pairs of image and audio in shards, 1"
BLOCK = 512  # bytes, of a tar archive
END = 2 * BLOCK  # zeros that end an archive
SHARD = {"name": str, "pairs": int, "bytes": int, "sha256": str, "ids": list, "suffixes": list, "files": list}


class Shard(NamedTuple):
    name: str
    address: str  # file or http(s)
    pairs: int
    bytes: int
    sha256: str  # empty where it is not known


class Index(NamedTuple):
    """All pairs of some shards, in their order."""

    shards: list[Shard]
    ids: np.ndarray  # (N,) bytes, UTF-8
    shard_of: np.ndarray  # (N,) int32
    files: np.ndarray  # (N, 4) int64: where the image begins, its bytes; the same of the audio
    kinds: np.ndarray  # (N,) uint8, places in `suffixes`
    suffixes: list[tuple[str, str]]  # of image and audio
    incomplete: list[str]  # ids that lack one of both


def load_index(path: str, files: Files | None = None) -> Index:
    """The index of the shards at a folder, a pattern or a list (`addresses.expand`).

    Local shards without an index are looked through once. UserError where the index is missing, is none, or does not
    know a shard.
    """
    addresses, place = expand(path)
    files = files or Files()
    text = _read(place, files)
    if text is None and any(address.startswith(WEB) for address in addresses):
        mend = f"python prepare_data.py shards --index '{shown(path)}' makes one"
        raise Absent(f"there is no index at {shown(place)}: {mend}, to be put beside the shards or their list")
    if text is None:
        return merged([scan(address) for address in addresses], addresses)
    entries = _entries(text, shown(place))
    unknown = [name_of(address) for address in addresses if name_of(address) not in entries]
    if unknown:
        raise UserError(f"{shown(place)} does not know {len(unknown)} of the shards: {first_ids(unknown)}")
    absent = [name for name in entries if name not in {*map(name_of, addresses)}]
    if absent and os.path.isdir(path):
        raise UserError(f"{len(absent)} shards of {place} are not there: {first_ids(absent)}")
    return merged([entries[name_of(address)] for address in addresses], addresses)


def _read(place: str, files: Files) -> str | None:
    """The text of an index; None where there is none."""
    if not place.startswith(WEB):
        return Path(place).read_text(encoding="utf-8") if Path(place).is_file() else None
    try:
        return b"".join(files.stream(place)).decode()
    except UserError as error:
        if "HTTP status 404" in str(error) or "HTTP status 403" in str(error):  # object stores hide what is not there
            return None
        raise


def _entries(text: str, place: str) -> dict[str, dict[str, Any]]:
    """{name: entry} of an index file."""
    try:
        index = json.loads(text)
        if index["format"] != FORMAT:
            raise UserError(f"{place} is an index of another format: {index['format']!r:.60}, wanted {FORMAT!r}")
        entries = {entry["name"]: entry for entry in index["shards"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{place} is no index of shards, or a damaged one: {error!r:.80}") from error
    for name, entry in entries.items():
        lacking = [key for key, kind in SHARD.items() if not isinstance(entry.get(key), kind)]
        if lacking or not len(entry["ids"]) == len(entry["files"]) == entry["pairs"]:
            raise UserError(f"{place}: what it says of {name} is damaged ({', '.join(lacking) or 'counts'})")
    return entries


def merged(entries: Sequence[Mapping[str, Any]], addresses: Sequence[str]) -> Index:
    """One index of the entries of several shards. UserError for an id that occurs twice and for places that overlap."""
    shards = [
        Shard(entry["name"], address, entry["pairs"], entry["bytes"], entry["sha256"])
        for entry, address in zip(entries, addresses, strict=True)
    ]
    ids = [name for entry in entries for name in entry["ids"]]
    if len({*ids}) < len(ids):
        twice = repeated(ids)
        raise UserError(f"{len(twice)} ids are twice in the shards of {shown(addresses[0])}: {first_ids(twice)}")
    if not ids:
        raise Absent(f"the shards of {shown(addresses[0])} hold no pair of image and audio")
    suffixes, kinds = [], []
    for entry in entries:
        own = entry["suffixes"]
        own = [tuple(own)] * entry["pairs"] if own and isinstance(own[0], str) else [*map(tuple, own)]
        suffixes += own
    known = sorted({*suffixes})
    kinds = np.array([*map({pair: i for i, pair in enumerate(known)}.get, suffixes)], np.uint8)
    try:
        files = np.array([place for entry in entries for place in entry["files"]], np.int64).reshape(len(ids), 4)
        sound = (files >= 0).all() and len(kinds) == len(ids)
    except (ValueError, TypeError, OverflowError):
        sound = False
    if not sound:
        raise UserError(
            f"the index of {shown(addresses[0])} is damaged: `files` or `suffixes` are not what they should be"
        )
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [shard.pairs for shard in shards])
    incomplete = [name for entry in entries for name in entry.get("incomplete", ())]
    return Index(shards, np.array([name.encode() for name in ids]), shard_of, files, kinds, known, incomplete)


# ---------------------------------------------------------------- looking through a shard


def key_of(name: str) -> str:
    """An id as the name of its files up to the first dot."""
    return name.replace("%", "%25").replace(".", "%2E")


class _Counted:
    """A file read from its begin to its end: counts and hashes what passes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.digest, self.count, self.rest, self.tail = pieces, hashlib.sha256(), 0, b"", b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self.rest) < size:
            piece = next(self.pieces, b"")
            if not piece:
                break
            self.digest.update(piece)
            self.count += len(piece)
            self.tail = (self.tail + piece)[-END:]
            self.rest += piece
        taken, self.rest = (self.rest, b"") if size < 0 else (self.rest[:size], self.rest[size:])
        return taken


def scan(address: str, files: Files | None = None, whole: bool = False) -> dict[str, Any]:
    """What the index says of a shard, found by looking through it; `whole` reads all of it, for the checksum.

    UserError, naming the shard, where it is cut short or no tar archive.
    """
    web = address.startswith(WEB)
    found, digest, size = {}, "", 0
    try:
        if web or whole:
            source = _Counted((files or Files()).stream(address) if web else _pieces(address))
            with tarfile.open(fileobj=source, mode="r|", bufsize=2**20) as archive:
                found = _members(archive)
            source.read()  # what lies behind the end of the archive
            digest, size, tail = source.digest.hexdigest(), source.count, source.tail
        else:
            size = os.path.getsize(address)
            with open(address, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                found = _members(archive)
                file.seek(max(size - END, 0))
                tail = file.read()
    except FileNotFoundError:
        raise Absent(f"there is no shard {address}") from None
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"the shard {shown(address)} is broken or no tar archive: {error}") from error
    last = max(
        (at + length for _, at, length in (part for parts in found.values() for part in parts.values())), default=0
    )
    if last > size or len(tail) < END or any(tail):
        raise cut_short(address, size, max(last + END, size))
    return _entry(name_of(address), found, size, digest)


def _pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            yield piece


def _members(archive: tarfile.TarFile) -> dict[str, dict[str, tuple[str, int, int]]]:
    """{key: {"image" | "audio": (suffix, where it begins, bytes)}}; files of other kinds are passed over."""
    found: dict[str, dict[str, tuple[str, int, int]]] = {}
    for member in archive:
        if not member.isreg():
            continue
        folder, _, name = member.name.rpartition("/")
        key, dot, suffix = name.partition(".")
        suffix = f".{suffix.lower()}"
        kind = "image" if suffix in IMAGES else "audio" if suffix in SOUNDS else ""
        if not (key and dot and kind):
            continue
        own = found.setdefault(f"{folder}/{key}" if folder else key, {})
        if kind in own:
            raise ValueError(f"it holds two files of {key} that are its {kind}")
        own[kind] = (suffix, member.offset_data, member.size)
    return found


def _entry(
    name: str, found: Mapping[str, Mapping[str, tuple[str, int, int]]], size: int, digest: str
) -> dict[str, Any]:
    pairs = {key: parts for key, parts in found.items() if len(parts) == 2}
    ids = [check_id(unquote(key.rpartition("/")[2]), name) for key in pairs]
    suffixes = [[parts["image"][0], parts["audio"][0]] for parts in pairs.values()]
    alike = bool(suffixes) and all(pair == suffixes[0] for pair in suffixes)
    return {
        "name": name,
        "pairs": len(pairs),
        "bytes": size,
        "sha256": digest,
        "ids": ids,
        "suffixes": suffixes[0] if alike else suffixes,
        "files": [[*parts["image"][1:], *parts["audio"][1:]] for parts in pairs.values()],
        "incomplete": [unquote(key) for key in found if key not in pairs],
    }


def write_index(path: Path, entries: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """An index file, one shard a line; about: what else it says of the shards."""
    head = json.dumps({"format": FORMAT, **about, "pairs": sum(entry["pairs"] for entry in entries)})
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_text(path, f'{head[:-1]}, "shards": [\n{lines}\n]}}\n')
