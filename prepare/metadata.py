"""Fetch the field's public lists and annotations, as metadata/sources.json names them, into metadata/.

A file gets its name only when its sha256 is that of the published one. What has arrived of a broken transfer waits as
<name>.part and is gone on with. A file that is there with another content may be the user's own and is kept.
"""

import hashlib
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from utils import UserError, atomic_path, number

SOURCES = Path(__file__).resolve().parents[1] / "metadata" / "sources.json"
BACK_OFF = 1.0  # seconds before the second try; doubles with each further one
CHUNK = 1 << 16  # bytes
TRY_AGAIN = (408, 425, 429)  # of the statuses 4xx; all of 5xx, too
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, ssl.SSLError)


class Source(NamedTuple):
    """One file of sources.json."""

    name: str
    url: str | None  # None: it lies behind a form
    sha256: str
    bytes: int
    entries: int
    by_hand: str  # how a user gets it, where there is no address


class NotHad(Exception):
    """Why a file could not be had."""


class GaveUp(NotHad):
    """Every try broke off."""


class ByHand(NotHad):
    """Only its authors give it out."""


class Broken(Exception):
    """Why a transfer ended too early; another try goes on from there."""


def load_sources(path: Path) -> dict[str, Source]:
    """{name: Source}, in the order of the file. Raises UserError when it cannot be read."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            name: Source(name, row["url"], row["sha256"], row["bytes"], row["entries"], row.get("by_hand", ""))
            for name, row in files.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error!r}") from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- transfer


def ask(url: str, begin: int, timeout: float) -> tuple[http.client.HTTPResponse, int]:
    """The open answer to a request for a file from byte `begin` on, and the byte that it really begins with."""
    request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py"})
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and begin:  # nothing from there on: what we have is of another file
                return ask(url, 0, timeout)
            reason = f"{url}: {error.code} {error.reason}"
            raise (Broken if error.code in TRY_AGAIN or error.code >= 500 else NotHad)(reason) from error
    resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
    return answer, begin if resumed else 0


def download(source: Source, url: str, part: Path, timeout: float, arrived: Callable[[int], object]) -> None:
    """One try to bring `part` to its full length. Raises Broken or NotHad; what came stays in `part`."""
    had = part.stat().st_size if part.exists() else 0
    if had == source.bytes:
        return
    try:
        answer, begin = ask(url, had if had < source.bytes else 0, timeout)
        with closing(answer), open(part, "r+b" if begin else "wb") as file:
            file.seek(begin)
            arrived(begin)
            while block := answer.read1(CHUNK):  # `read` would lose what came before a stall
                file.write(block)
                arrived(file.tell())
                if file.tell() > source.bytes:
                    break
    except TimeoutError as error:
        raise Broken(f"{url}: nothing came for {timeout:g} s") from error
    except NETWORK_ERRORS as error:
        raise Broken(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}") from error
    size = part.stat().st_size
    if size > source.bytes:
        part.unlink()
        raise NotHad(f"{url}: longer than the {source.bytes:,} bytes expected: another file")
    if size < source.bytes:
        raise Broken(f"{url}: ended after {size:,} of {source.bytes:,} bytes")


def fetch(source: Source, url: str, part: Path, retries: int, timeout: float, arrived: Callable[[int], object]) -> None:
    """Download into `part` and check it. Raises NotHad; then `part` is what a later run can go on with, or is gone."""
    for tries_left in range(retries, -1, -1):
        resumed = part.exists()
        try:
            download(source, url, part, timeout, arrived)
        except Broken as error:
            if not tries_left:
                raise GaveUp(f"{error} (tries: {retries + 1})") from error
            time.sleep(BACK_OFF * 2 ** (retries - tries_left))
            continue
        found = sha256_of(part)
        if found == source.sha256:
            return
        part.unlink()
        if not (resumed and tries_left):  # the first piece may have been of an older file: once more, from the start
            raise NotHad(f"{url}: wrong checksum: sha256 {source.sha256} expected, {found} found")


# ---------------------------------------------------------------- one file to its place


def bring(source: Source, args: Namespace, retries: int, arrived: Callable[[int], object]) -> str:
    """Put a file into its place, checked; what was done, in a word. Raises NotHad.

    arrived: is told how many bytes of the file are there.
    """
    target = args.out / source.name
    if target.exists():
        found = sha256_of(target)
        if found == source.sha256:
            return "there already"
        if not args.force:
            raise NotHad(f"{target} is there with another content (sha256 {found}) and is kept; --force replaces it")
    if args.from_folder:
        copy(source, args.from_folder / source.name, target)
        return "copied"
    url = f"{args.base_url.rstrip('/')}/{source.name}" if args.base_url else source.url
    if url is None:
        raise ByHand(source.by_hand)
    part = target.with_name(f"{source.name}.part")
    fetch(source, url, part, retries, args.timeout, arrived)
    os.replace(part, target)
    return "fetched"


def copy(source: Source, origin: Path, target: Path) -> None:
    """Copy a local file and check the copy. Raises NotHad."""
    if not origin.is_file():
        raise (NotHad if source.url else ByHand)(f"{origin} does not exist. {source.by_hand}".strip())
    with atomic_path(target) as new:
        shutil.copyfile(origin, new)
        found = sha256_of(new)
        if found != source.sha256:
            raise NotHad(f"{origin}: wrong checksum: sha256 {source.sha256} expected, {found} found")


# ---------------------------------------------------------------- the sub-command


def address(text: str) -> str:
    """An argparse type: an http or https address."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ArgumentTypeError(f"{text!r} is no address http://... or https://...")
    return text


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these files; by default all that have an address")
    parser.add_argument("--out", type=Path, default=Path("metadata"), metavar="DIR", help="where they are put")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--from", type=Path, dest="from_folder", metavar="DIR", help="copy them from this folder")
    origin.add_argument("--base_url", type=address, metavar="URL", help="fetch them all from URL/NAME: a mirror")
    parser.add_argument("--force", action="store_true", help="replace files that are there with another content")
    parser.add_argument(
        "--retries", type=number(int, low=0), default=4, metavar="N", help="further tries after a broken transfer"
    )
    parser.add_argument(
        "--timeout", type=number(float, above=0), default=30, metavar="S", help="seconds without a byte until a new try"
    )


def choose(sources: Mapping[str, Source], names: Sequence[str] | None) -> list[Source]:
    """The named files, each once, or all. Raises UserError on a name that there is not."""
    unknown = [name for name in names or () if name not in sources]
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: no such file; there are {', '.join(sources)}")
    return [sources[name] for name in dict.fromkeys(names or sources)]


def run(args: Namespace) -> None:
    """`prepare_data.py metadata`. Raises UserError, after the table, when a file that was asked for is not there."""
    wanted = choose(load_sources(SOURCES), args.only)
    if args.from_folder and not args.from_folder.is_dir():
        raise UserError(f"--from {args.from_folder}: there is no such folder")
    args.out.mkdir(parents=True, exist_ok=True)
    states, lacking, retries, done = [], [], args.retries, 0
    with tqdm(total=sum(source.bytes for source in wanted), unit="B", unit_scale=True, disable=None) as bar:
        for source in wanted:
            bar.set_description(source.name)
            try:
                state = bring(source, args, retries, lambda there, before=done: bar.update(before + there - bar.n))
            except ByHand as error:
                state = f"by hand: {error}"
                lacking += [source.name] if args.only else []
            except NotHad as error:
                state = f"not had: {error}"
                lacking.append(source.name)
                if isinstance(error, GaveUp):
                    retries = 0  # with a dead line, do not wait for every single file
            states.append(state)
            done += source.bytes
            bar.update(done - bar.n)
    width = max(len(source.name) for source in wanted)
    print(f"{'file':{width}}  entries  state")
    for source, state in zip(wanted, states):
        print(f"{source.name:{width}}  {source.entries:7,}  {state}")
    print("They belong to their authors; metadata/sources.json says what is known of their licences.")
    if lacking:
        raise UserError(f"{len(lacking)} of {len(wanted)} files could not be had, see above: {', '.join(lacking)}")
