"""Shards are found at folders, patterns and lists, and read from the web as from a disk; faults are named."""

import pytest
from webserver import served

import shards.addresses as addresses
from shards.addresses import Files, are_shards, expand, shown
from utils import Absent, UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("a-00.tar", "a-01.tar"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 40)
    return tmp_path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(addresses, "WAITS", (0, 0, 0))


def names_of(found):
    return [addresses.name_of(address) for address in found[0]], addresses.name_of(found[1])


def test_a_folder_a_pattern_and_a_list_name_the_same_shards(folder):
    pytest.importorskip("braceexpand", reason="pip install -r requirements-shards.txt")
    (folder / "list.txt").write_text(f"# pre-signed\nhttps://x/a-00.tar?s=1\n{folder}/a-01.tar\n")
    wanted = ["a-00.tar", "a-01.tar"], "index.json"
    for path in (str(folder), f"{folder}/a-{{00..01}}.tar", "http://x/y/a-{00..01}.tar?s=1", f"{folder}/list.txt"):
        assert are_shards(path) and names_of(expand(path)) == wanted
    assert expand("http://x/y/a-{00..01}.tar?s=1")[1] == "http://x/y/index.json?s=1"
    assert expand(f"{folder}/list.txt")[1] == str(folder / "index.json")


@pytest.mark.parametrize("path", ["pipe:curl x.tar", "s3://bucket/a-{0..1}.tar", "file:/x.tar"])
def test_nothing_but_files_and_http_is_opened(path, tmp_path):
    assert are_shards(path)
    with pytest.raises(UserError, match="are not read"):
        expand(path)
    (tmp_path / "list.txt").write_text(f"{path}\n")
    with pytest.raises(UserError, match="are not read"):
        expand(str(tmp_path / "list.txt"))


def test_a_path_that_names_none_or_one_twice_is_refused(folder, tmp_path_factory):
    with pytest.raises(Absent, match="no shards"):
        expand(str(tmp_path_factory.mktemp("empty")))
    (folder / "list.txt").write_text("http://x/a.tar\nhttp://y/a.tar\n")
    with pytest.raises(UserError, match="twice"):
        expand(str(folder / "list.txt"))
    assert not are_shards(None) and not are_shards(str(folder.parent))


def test_parts_are_the_same_from_a_disk_and_from_the_web(folder):
    whole = (folder / "a-00.tar").read_bytes()
    with served(folder) as (base, asked), served(folder, ranges=False) as (plain, _):
        files = Files()
        for address in (f"{folder}/a-00.tar", f"{base}/a-00.tar"):
            assert files.read(address, 300, 5000) == whole[300:5300]
        with pytest.warns(UserWarning, match="no byte ranges"):
            assert files.read(f"{plain}/a-00.tar", 300, 5000) == whole[300:5300]
        assert b"".join(files.stream(f"{base}/a-00.tar")) == whole
        assert asked == [("a-00.tar", 300), ("a-00.tar", 0)]


def test_what_breaks_off_is_asked_for_from_there_on(folder):
    whole = (folder / "a-00.tar").read_bytes()
    with served(folder, breaks={"a-00.tar": 2}) as (base, asked):
        assert Files().read(f"{base}/a-00.tar", 100, 8000) == whole[100:8100]
    assert [start for _, start in asked] == [100, 4100, 6100]


@pytest.mark.parametrize("faults, wanted", [
    ({"status": {"a-00.tar": 503}}, "HTTP status 503"),
    ({"status": {"a-00.tar": 403}}, "may have expired"),
    ({"token": "other"}, "may have expired"),
    ({"breaks": {"a-00.tar": 99}}, "cannot be read beyond byte"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_without_its_signature(folder, faults, wanted):
    with served(folder, **faults) as (base, _), pytest.raises(UserError, match=wanted) as error:
        Files().read(f"{base}/a-00.tar?signature=secret", 0, 2)
    assert "a-00.tar" in str(error.value) and "secret" not in str(error.value)


def test_a_server_that_is_not_there_is_named_without_the_signature():
    with pytest.raises(UserError, match=r"a\.tar cannot be read") as error:
        Files().read("http://127.0.0.1:9/a.tar?signature=secret", 0, 2)
    assert "secret" not in str(error.value)
    assert shown("https://x/a.tar?signature=secret") == "https://x/a.tar"


def test_a_shard_that_is_cut_short_is_named(folder):
    with served(folder) as (base, _):
        for address in (f"{folder}/a-00.tar", f"{base}/a-00.tar"):
            with pytest.raises(UserError, match=r"a-00.tar is cut short: it ends at byte 10240"):
                Files().read(address, 10000, 1000)
    with pytest.raises(UserError, match=r"b.tar cannot be read"):
        Files().read(f"{folder}/b.tar", 0, 10)
