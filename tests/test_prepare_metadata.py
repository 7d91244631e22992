"""Fetching the public lists, from servers on loopback that behave in every bad way, and from a folder."""

import hashlib
import json
import threading
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, files_up_to, shared_folder

import prepare.metadata as prepare_metadata
from annotations import read_ids

CONTENT = {name: f"{name}\n".encode() * 20_000 for name in ("a.txt", "b.csv", "gated.csv")}
FIELDS = {"url", "sha256", "bytes", "entries", "what", "licence"}


class Server(ThreadingHTTPServer):
    """Serves CONTENT; behaviour[name] is what it does to a request for it, requests[name] counts them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.requests[name] += 1
        does, body = self.server.behaviour.get(name, "good"), CONTENT[name]
        first = self.server.requests[name] == 1
        if does == "404" or (does == "503 once" and first):
            return self.send_error(404 if does == "404" else 503)
        if does == "wrong":
            body = body.replace(b".", b"!")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if does == "truncated" or (does == "breaks once" and first):
            return self.wfile.write(body[: len(body) // 2])
        if does == "stalled":
            self.wfile.write(body[:1000])
            self.server.released.wait(20)
            return None
        return self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running Server whose files stand in sources.json; the last of them has no address there."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))  # between two tries
    with Server() as server:
        rows = {
            name: {"url": f"{server.url}/{name}", "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
            | {"entries": 20_000, "what": "", "licence": ""}
            for name, body in CONTENT.items()
        }
        rows["gated.csv"] |= {"url": None, "by_hand": "ask its authors"}
        sources = tmp_path / "sources.json"
        sources.write_text(json.dumps({"files": rows}))
        monkeypatch.setattr(prepare_metadata, "SOURCES", sources)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def fetch(cli, server, tmp_path):
    """fetch(flags...) runs `prepare_data.py metadata` into tmp_path/metadata."""

    def run(*flags: object):
        return cli("prepare_data", "metadata", "--out", tmp_path / "metadata", "--timeout", 5, "--retries", 2, *flags)

    return run


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "metadata").iterdir())


# ---------------------------------------------------------------- servers


def test_good_files_arrive_checked_and_are_not_fetched_again(fetch, server, tmp_path):
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path) == ["a.txt", "b.csv"]
    assert all((tmp_path / "metadata" / name).read_bytes() == CONTENT[name] for name in kept(tmp_path))
    assert "a.txt" in done.stdout and "20,000  fetched" in done.stdout
    assert not done.stderr, "pooch's own log"
    again = fetch()
    assert again.stdout.count("there already") == 2 and server.requests.total() == 2


@pytest.mark.parametrize("trouble", ["breaks once", "503 once"])
def test_a_broken_transfer_and_a_busy_server_are_tried_again(fetch, server, tmp_path, trouble):
    server.behaviour["a.txt"] = trouble
    assert fetch("--only", "a.txt").returncode == 0
    assert server.requests["a.txt"] == 2
    assert kept(tmp_path) == ["a.txt"] and (tmp_path / "metadata/a.txt").read_bytes() == CONTENT["a.txt"]


def test_a_transfer_that_always_ends_early_leaves_nothing(fetch, server, tmp_path):
    server.behaviour["a.txt"] = "truncated"
    done = fetch("--only", "a.txt", "b.csv")
    assert done.returncode == 2 and "a.txt" in done.stderr and "b.csv" not in done.stderr
    assert "(tries: 3)" in done.stdout and server.requests["a.txt"] == 3
    assert kept(tmp_path) == ["b.csv"]


def test_a_wrong_checksum_keeps_nothing_and_says_both(fetch, server, tmp_path):
    server.behaviour["a.txt"] = "wrong"
    done = fetch("--only", "a.txt")
    assert done.returncode == 2 and kept(tmp_path) == []
    for body in (CONTENT["a.txt"], CONTENT["a.txt"].replace(b".", b"!")):
        assert hashlib.sha256(body).hexdigest() in done.stdout


def test_not_found_is_final(fetch, server, tmp_path):
    server.behaviour["a.txt"] = "404"
    done = fetch()
    assert done.returncode == 2 and "not fetched: 404" in done.stdout and server.requests["a.txt"] == 1
    assert kept(tmp_path) == ["b.csv"]


def test_a_stalled_server_does_not_hold_the_run(fetch, server, tmp_path):
    server.behaviour["a.txt"] = "stalled"
    done = fetch("--only", "a.txt", "--timeout", 0.2)
    assert done.returncode == 2 and "timed out" in done.stdout and server.requests["a.txt"] == 3
    assert kept(tmp_path) == []


def test_a_dead_line_is_not_waited_for_with_every_file(fetch, server):
    server.behaviour |= {"a.txt": "truncated", "b.csv": "truncated"}
    assert fetch().returncode == 2
    assert server.requests == {"a.txt": 3, "b.csv": 1}


def test_a_server_that_is_not_there_is_one_line(cli, server, tmp_path):
    done = cli("prepare_data", "metadata", "--out", tmp_path, "--retries", 0, "--base_url", "http://127.0.0.1:9")
    assert done.returncode == 2 and "refused" in done.stdout and len(done.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- files, folders, flags


def test_the_users_own_edit_is_kept_unless_forced(fetch, server, tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/a.txt").write_text("mine")
    done = fetch("--only", "a.txt")
    assert done.returncode == 2 and "--force" in done.stdout and not server.requests["a.txt"]
    assert (tmp_path / "metadata/a.txt").read_text() == "mine"
    assert fetch("--only", "a.txt", "--force").returncode == 0
    assert (tmp_path / "metadata/a.txt").read_bytes() == CONTENT["a.txt"]


def test_a_force_that_fails_leaves_what_was_there(fetch, server, tmp_path):
    server.behaviour["a.txt"] = "wrong"
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/a.txt").write_text("mine")
    assert fetch("--only", "a.txt", "--force").returncode == 2
    assert (tmp_path / "metadata/a.txt").read_text() == "mine"


@pytest.mark.parametrize("transfer", ["fetched", "copied"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(fetch, server, tmp_path, transfer):
    (tmp_path / "copies").mkdir()
    for name in ("a.txt", "b.csv"):
        (tmp_path / "copies" / name).write_bytes(CONTENT[name])
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/b.csv").write_text("mine")
    origin = ["--from", tmp_path / "copies"] * (transfer == "copied")
    assert fetch("--only", "a.txt", *origin).returncode == 0
    with files_up_to(50_000):
        done = fetch("--only", "a.txt", "b.csv", "--force", *origin)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"{tmp_path}/metadata/b.csv cannot be written (File too large)" in done.stderr
    assert kept(tmp_path) == ["a.txt", "b.csv"] and (tmp_path / "metadata/b.csv").read_text() == "mine"


def test_two_runs_fill_one_folder_together(server, tmp_path, monkeypatch):
    sources = prepare_metadata.load_sources(prepare_metadata.SOURCES)
    args = Namespace(out=tmp_path / "metadata", from_folder=None, base_url=server.url, timeout=5, force=False)
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(lambda name: prepare_metadata.bring(sources[name], args, 0), [*CONTENT] * 8))
    assert {*states} <= {"fetched", "there already"} and states.count("fetched") >= len(CONTENT)
    assert kept(tmp_path) == sorted(CONTENT)
    assert all((tmp_path / "metadata" / name).read_bytes() == body for name, body in CONTENT.items())


def test_a_gated_file_is_explained_and_fails_only_when_asked_for(fetch):
    done = fetch()
    assert done.returncode == 0 and "by hand: ask its authors" in done.stdout
    assert fetch("--only", "gated.csv").returncode == 2


def test_a_mirror_serves_gated_files_too(fetch, server, tmp_path):
    assert fetch("--base_url", server.url).returncode == 0
    assert kept(tmp_path) == ["a.txt", "b.csv", "gated.csv"]


def test_from_a_folder_each_file_is_checked(fetch, server, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "a.txt").write_bytes(CONTENT["a.txt"])
    (copies / "b.csv").write_bytes(CONTENT["b.csv"][:-1])
    done = fetch("--from", copies)
    assert done.returncode == 2 and "b.csv: wrong checksum" in done.stdout and "by hand" in done.stdout
    assert kept(tmp_path) == ["a.txt"] and not server.requests
    (copies / "b.csv").unlink()
    assert "does not exist" in fetch("--from", copies).stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--only", "c.txt"), "c.txt"),
        (("--from", "no/such/folder"), "no such folder"),
        (("--base_url", "file:///etc"), "http"),
        (("--base_url", "http://[::1"), "http"),
        (("--base_url", "http://h", "--from", "."), "not allowed with"),
        (("--retries", "-1"), "at least 0"),
        (("--timeout", "0"), "above 0"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(fetch, flags, says):
    done = fetch(*flags)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- sources.json


def test_sources_name_a_public_address_or_the_way_to_the_file():
    for name, row in json.loads((ROOT / "metadata/sources.json").read_text())["files"].items():
        assert row.keys() >= FIELDS and row["licence"], name
        assert (row["url"] or "").startswith("https://raw.githubusercontent.com/") or row["by_hand"], name


@pytest.mark.slow
def test_sources_agree_with_the_published_files(cli, tmp_path):
    folder = shared_folder("metadata")
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    done = cli("prepare_data", "metadata", "--from", folder, "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    sources = prepare_metadata.load_sources(ROOT / "metadata/sources.json")
    assert sources.keys() - sums.keys() == {"vggsounder.csv"}  # from a package, and no copy of it is there
    for name, source in ((name, source) for name, source in sources.items() if name in sums):
        path = tmp_path / name
        assert (source.sha256, source.bytes) == (sums[name], path.stat().st_size), name
        if path.suffix == ".json":
            assert len(json.loads(path.read_text())) == source.entries, name
        else:
            lines = path.read_text().split("\n")
            headed = lines[0] in ("video,audio,label", "video_id,split", "name,start,category,split")
            assert len([line for line in lines if line]) - headed == source.entries, name
    assert len(read_ids(tmp_path / "flickr_test.csv")) == sources["flickr_test.csv"].entries
