"""Fetch the field's public lists and annotations, as metadata/sources.json names them, into metadata/.

pooch transfers them: a file gets its name only when its sha256 is that of the published one, a broken transfer is tried
again from the start and leaves nothing. A file that is there with another content may be the user's own and is kept.
"""

import json
import os
import shutil
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pooch
import requests
from tabulate import tabulate
from tqdm import tqdm

from utils import Unwritable, UserError, add_boolean, number

SOURCES = Path(__file__).resolve().parents[1] / "metadata" / "sources.json"
CHUNK = 1 << 16  # bytes
TRY_AGAIN = (408, 425, 429)  # of the statuses 4xx; all of 5xx, too


class Source(NamedTuple):
    """One file of sources.json."""

    name: str
    url: str | None  # None: it lies behind a form
    sha256: str
    bytes: int
    entries: int
    by_hand: str  # how a user gets it, where there is no address, or another way than by it


class NotFetched(Exception):
    """Why a file could not be had."""


class GaveUp(NotFetched):
    """Every try broke off."""


class ByHand(NotFetched):
    """Only its authors give it out."""


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


# ---------------------------------------------------------------- one file to its place


class Downloader(pooch.HTTPDownloader):
    """pooch's own, except that an answer which another try would not change, such as 404, is not asked for again."""

    def __call__(self, url: str, output_file: str, cache: pooch.Pooch, check_only: bool = False) -> bool | None:
        try:
            return super().__call__(url, output_file, cache, check_only)
        except requests.HTTPError as error:
            status = error.response.status_code
            if status in TRY_AGAIN or status >= 500:
                raise
            raise NotFetched(str(error)) from error


def copy_file(origin: str, target: str, _: pooch.Pooch) -> None:
    """What pooch calls in the place of a download, with --from."""
    shutil.copyfile(origin, target)


def origin_of(source: Source, args: Namespace) -> str:
    """The address of a file, or its path with --from. Raises NotFetched where there is neither."""
    if args.from_folder:
        origin = args.from_folder / source.name
        if not origin.is_file():
            raise (ByHand if source.by_hand else NotFetched)(f"{origin} does not exist. {source.by_hand}".strip())
        return str(origin)
    if args.base_url:
        return f"{args.base_url.rstrip('/')}/{source.name}"
    if source.url is None:
        raise ByHand(source.by_hand)
    return source.url


def bring(source: Source, args: Namespace, retries: int) -> str:
    """Put a file into its place, checked; what was done, in a word. Raises NotFetched, Unwritable."""
    target = args.out / source.name
    if target.exists():
        found = pooch.file_hash(target)
        if found == source.sha256:
            return "there already"
        if not args.force:
            raise NotFetched(
                f"{target} is there with another content (sha256 {found}) and is kept; --force replaces it"
            )
    origin = origin_of(source, args)
    transfer = copy_file if args.from_folder else Downloader(chunk_size=CHUNK, timeout=args.timeout)
    cache = pooch.create(
        args.out,
        base_url="",
        registry={source.name: source.sha256},
        urls={source.name: origin},
        retry_if_failed=0 if args.from_folder else retries,
    )
    try:
        cache.fetch(source.name, downloader=transfer)
    except requests.RequestException as error:
        raise GaveUp(f"{origin}: {' '.join(str(error).split())} (tries: {retries + 1})") from error
    except ValueError as error:
        raise NotFetched(f"{origin}: wrong checksum: {str(error).partition('. ')[0]}") from error
    except OSError as error:
        if error.filename == origin and error.filename2 is None:
            raise  # it cannot be read
        raise Unwritable(f"{target} cannot be written ({error.strerror or error}); files before it are kept") from error
    os.chmod(target, 0o644)  # pooch's temporary file is its user's only
    return "copied" if args.from_folder else "fetched"


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
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="fetch these files only (default: all with a known address)"
    )
    parser.add_argument("--out", type=Path, default=Path("metadata"), metavar="DIR", help="folder to put them in")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--from", type=Path, dest="from_folder", metavar="DIR", help="copy files from here, no download"
    )
    origin.add_argument("--base_url", type=address, metavar="URL", help="a mirror: fetch all files from URL/NAME")
    add_boolean(parser, "--force", "replace existing files whose content differs")
    parser.add_argument(
        "--retries", type=number(int, low=0), default=4, metavar="N", help="retries after a broken transfer"
    )
    parser.add_argument(
        "--timeout",
        type=number(float, above=0),
        default=30,
        metavar="S",
        help="seconds without data after which a transfer is retried",
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
    rows, lacking, retries = [], [], args.retries
    pooch.get_logger().setLevel("WARNING")
    with tqdm(total=sum(source.bytes for source in wanted), unit="B", unit_scale=True, disable=None) as bar:
        for source in wanted:
            bar.set_description(source.name)
            try:
                state = bring(source, args, retries)
            except ByHand as error:
                state = f"by hand: {error}"
                lacking += [source.name] if args.only else []
            except NotFetched as error:
                state = f"not fetched: {error}"
                lacking.append(source.name)
                if isinstance(error, GaveUp):
                    retries = 0  # with a dead line, do not wait for every single file
            rows.append((source.name, f"{source.entries:,}", state))
            bar.update(source.bytes)
    aligned = ("left", "right", "left")
    print(tabulate(rows, ("file", "entries", "state"), "plain", colalign=aligned, disable_numparse=True))
    print("They belong to their authors; metadata/sources.json says what is known of their licences.")
    if lacking:
        raise UserError(f"{len(lacking)} of {len(wanted)} files could not be had, see above: {', '.join(lacking)}")
