import os
import sys

import pytest

from NMSWSegment.files.user_cache import cached_folder, put_in_cache, user_cache_folder


@pytest.fixture(autouse=True)
def a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NMSW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(text):
    return lambda folder: (folder / "file").write_text(text)


def test_cache_gives_back_what_was_put_in():
    assert cached_folder("a") is None
    assert put_in_cache("a", write("1")) == cached_folder("a") == user_cache_folder() / "a"
    put_in_cache("a", write("2"))
    assert (cached_folder("a") / "file").read_text(encoding="utf-8") == "2"


def test_cache_keeps_no_half_of_a_folder(a_cache):
    def fail(folder):
        (folder / "file").write_text("half")
        raise OSError("the disk is full")

    assert put_in_cache("a", fail) is None
    with pytest.raises(ZeroDivisionError):
        put_in_cache("a", lambda folder: 1 / 0)
    assert list(a_cache.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_cache_is_private_and_what_others_may_write_is_not_read(a_cache):
    folder = put_in_cache("a", write("1"))
    assert a_cache.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert cached_folder("a") is None
    folder.chmod(0o755)
    assert cached_folder("a") == folder
    a_cache.chmod(0o777)
    assert cached_folder("a") is None


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NMSW_CACHE", str(tmp_path / "file" / "cache"))
    assert put_in_cache("a", write("1")) is None and cached_folder("a") is None


@pytest.mark.parametrize(("platform", "variable", "end"), [("win32", "LOCALAPPDATA", ("NMSWSegment", "Cache")), ("linux", "XDG_CACHE_HOME", ("NMSWSegment",))])
def test_cache_lies_where_the_system_keeps_caches(platform, variable, end, tmp_path, monkeypatch):
    monkeypatch.delenv("NMSW_CACHE")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert user_cache_folder() == tmp_path.joinpath(*end)


@pytest.mark.parametrize("opened", ["a", ".filling-*/a"])
def test_folder_that_another_process_has_open_stays_whole(a_cache, monkeypatch, opened):
    put_in_cache("a", write("1"))
    replace = os.replace

    def refuse_what_is_open(source, target):
        if source.match(f"{a_cache.name}/{opened}"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_what_is_open)
    assert put_in_cache("a", write("2")) == cached_folder("a") == a_cache / "a"
    assert (a_cache / "a" / "file").read_text(encoding="utf-8") == "1" and [path.name for path in a_cache.iterdir()] == ["a"]
