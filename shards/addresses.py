"""Where shards are: a folder, a pattern with braces, or a list of addresses; local files and http(s), nothing else.

No shell and no other program takes part. The part of an address behind its question mark, which may be a signature,
appears in no message.
"""

import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import requests
import urllib3

from utils import Absent, UserError

INDEX = "index.json"
WEB = ("http://", "https://")
TIMEOUT = (10, 60)  # seconds: to connect, and without a byte
WAITS = (0.5, 1, 2, 4, 8)  # seconds before another attempt
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
OPEN_FILES = 64
CHUNK = 2**20


def are_shards(path: str | None) -> bool:
    """Whether a data path means shards: an address, a pattern, a list of addresses, or a folder that holds shards."""
    if not path:
        return False
    if path.startswith(WEB) or "{" in path or path.endswith((".tar", ".txt")) or _scheme(path):
        return True
    folder = Path(path)
    return folder.is_dir() and ((folder / INDEX).is_file() or any(folder.glob("*.tar")))


def _scheme(path: str) -> str:
    """What stands before the colon of pipe:, s3://, file:// and the like; empty for a plain path."""
    name, colon, _ = path.partition(":")
    return name if colon and name.isalnum() and not os.path.exists(path) and not path.startswith(WEB) else ""


def expand(path: str) -> tuple[list[str], str]:
    """A data path -> the addresses of its shards, and that of their index. UserError where there is none."""
    listed = path.endswith(".txt") and not path.startswith(WEB)
    if listed:
        addresses = _read_list(path)
    elif Path(path).is_dir():
        addresses = [*map(str, sorted(Path(path).glob("*.tar")))]
    else:
        addresses = _braces(path)
    for address in addresses:
        if scheme := _scheme(address):
            raise UserError(f"shards at {scheme}: are not read: give files or http(s) addresses (pre-signed ones, too)")
    given = [address for address in addresses if name_of(address) == INDEX]
    shards = [address for address in addresses if name_of(address) != INDEX]
    if not shards:
        raise Absent(f"there are no shards at {shown(path)}: no *.tar in the folder, the pattern or the list")
    names = [name_of(address) for address in shards]
    if len({*names}) < len(names):
        raise UserError(f"{shown(path)} names the shard {max(names, key=names.count)} twice")
    return shards, given[0] if given else _sibling(path if listed else shards[0], INDEX)


def _read_list(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Absent(f"the list of shards {path} cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _braces(path: str) -> list[str]:
    if "{" not in path:
        return [path]
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise UserError(
            f"patterns of shards need a package: pip install -r requirements-shards.txt ({error})"
        ) from error
    try:
        return [*braceexpand(path)]
    except UnbalancedBracesError as error:
        raise UserError(f"{shown(path)}: a brace is missing") from error


def _sibling(address: str, name: str) -> str:
    """The address of another file in the same folder, with the same query."""
    if not address.startswith(WEB):
        return str(Path(address).with_name(name))
    parts = urlsplit(address)
    return parts._replace(path=str(PurePosixPath(parts.path).with_name(name))).geturl()


def name_of(address: str) -> str:
    """The name of the file at an address."""
    path = unquote(urlsplit(address).path) if address.startswith(WEB) else address
    return path.rpartition("/")[2]


def shown(address: str) -> str:
    """The address as messages and results may show it: without a query, which may be a signature."""
    return urlsplit(address)._replace(query="", fragment="").geturl() if address.startswith(WEB) else address


# ---------------------------------------------------------------- reading


class Files:
    """Parts of files at local and http(s) addresses, of which the last OPEN_FILES used stay open. For one process."""

    def __init__(self) -> None:
        self.opened = 0  # local files, and requests
        self._open: OrderedDict[str, int] = OrderedDict()
        self._session, self._process, self._lock = None, os.getpid(), threading.Lock()

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def read(self, address: str, start: int, size: int) -> bytes | memoryview:
        """`size` bytes from byte `start` on. UserError where they are not there or, after some attempts, not given."""
        if address.startswith(WEB):
            return self._read_web(address, start, size)
        with self._local(address) as file:
            content = os.pread(file, size, start)
            while len(content) < size and (more := os.pread(file, size - len(content), start + len(content))):
                content += more
        if len(content) < size:
            raise cut_short(address, start + len(content), start + size)
        return content

    def announce(self, address: str, start: int, size: int) -> None:
        """Let the system read bytes of a local file that are asked for soon."""
        with self._local(address) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def _local(self, address: str) -> Iterator[int]:
        try:
            with self._lock:  # so that no other thread closes it
                yield self._file(address)
        except OSError as error:
            raise UserError(f"the shard {address} cannot be read: {error.strerror}") from error

    def _file(self, address: str) -> int:
        if address not in self._open:
            self._open[address] = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
            self.opened += 1
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(address)
        return self._open[address]

    def _read_web(self, address: str, start: int, size: int) -> memoryview:
        content, at = memoryview(bytearray(size)), 0
        for piece in self.stream(address, start, size):
            content[at : at + len(piece)] = piece
            at += len(piece)
        if at < size:
            raise cut_short(address, start + at, start + size)
        return content

    def stream(self, address: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        """The bytes of an http(s) address piece by piece, to the end where no size is given.

        What breaks off is asked for again from there on, and given up when WAITS have passed without a byte.
        """
        at, end, waits = start, None if size is None else start + size, list(WAITS)
        while end is None or at < end:
            reason = "the connection was closed"
            try:
                for piece in self._ask(address, at, end):
                    at, waits = at + len(piece), list(WAITS)
                    yield piece
                if end is None:
                    return
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                reason = _reason(error)
            if at == end:
                return
            if not waits:
                raise UserError(f"the shard {shown(address)} cannot be read beyond byte {at}: {reason}")
            time.sleep(waits.pop(0))

    def _ask(self, address: str, start: int, end: int | None) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-" + (str(end - 1) if end is not None else "")
        self.opened += 1
        with self._web().get(address, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            status = answer.status_code
            if status in TRY_AGAIN:
                raise requests.RequestException(f"HTTP status {status}")
            if status == 416:
                raise cut_short(address, start, end or start)
            if status not in (200, 206):
                hint = ": the address may have expired" if status in (401, 403) else ""
                raise UserError(f"the shard {shown(address)} cannot be read: HTTP status {status}{hint}")
            skip = start if status == 200 else 0
            if skip:
                warnings.warn("a server of shards knows no byte ranges: it sends whole shards for parts", stacklevel=2)
            left = None if end is None else end - start
            while left is None or left > 0:
                piece = answer.raw.read(CHUNK if left is None or skip else min(CHUNK, left))
                if not piece:
                    return
                piece, skip = piece[skip:], max(skip - len(piece), 0)
                if left is not None:
                    piece = piece[:left]
                    left -= len(piece)
                if piece:
                    yield piece

    def _web(self) -> requests.Session:
        with self._lock:
            if self._session is None or self._process != os.getpid():  # a forked worker shares no connection
                self._session, self._process = requests.Session(), os.getpid()
            return self._session


def cut_short(address: str, there: int, wanted: int) -> UserError:
    return UserError(
        f"the shard {shown(address)} is cut short: it ends at byte {there}, and its index asks for {wanted}; write or "
        "copy it again"
    )


def _reason(error: Exception) -> str:
    """What went wrong, without the address, which may hold a signature."""
    cause = error
    while isinstance(cause, requests.RequestException | urllib3.exceptions.HTTPError) and cause.args:
        inner = getattr(cause.args[0], "reason", cause.args[0])
        if not isinstance(inner, BaseException) or inner is cause:
            break
        cause = inner
    if isinstance(cause, requests.RequestException) and str(cause).startswith("HTTP status"):
        return str(cause)
    return getattr(cause, "strerror", None) or type(cause).__name__
