"""Where files lie: paths of this machine and of buckets, and what is said where there is none."""

import sys
from pathlib import Path

import numpy as np
import pytest

import buckets
from advmoe_jax import files, storage
from advmoe_jax.errors import UserError
from advmoe_jax.storage import is_remote, path_of


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_of_this_machine_are_pathlibs(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("runs/x", "/a/b", "~/x", "a:/b", Path("runs")):
        assert path_of(text) == Path(text).expanduser() and not is_remote(path_of(text))


def test_a_user_that_is_not_there():
    with pytest.raises(UserError, match="~nobody-of-that-name/x: there is no such user here"):
        path_of("~nobody-of-that-name/x")


def test_paths_of_buckets(bucket):
    for text in ("gs://bucket/a/b", "S3://bucket/a//b/", path_of("s3://bucket/a/b")):
        path = path_of(text)
        assert is_remote(path) and str(path) == f"{str(text)[:2].lower()}://bucket/a/b"
        assert (path.name, str(path.parent / "c")) == ("b", f"{path.parent}/c")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hdfs://host/x", "hdfs:// is not supported: use a local directory, gs:// or s3://"),
        ("file:///tmp/x", "file:// is not supported"),
        ("memory://x", "memory:// is not supported"),
        ("gs://", "gs:// names no bucket: write gs://bucket/directory"),
        ("s3:///", "s3:/// names no bucket"),
    ],
)
def test_other_paths_are_refused(text, said):
    assert said in refusal(path_of, text)


@pytest.mark.parametrize(("scheme", "library", "extra"), [("gs", "gcsfs", "gcs"), ("s3",) * 3])
def test_a_missing_library_is_named(monkeypatch, scheme, library, extra):
    library = {"s3": "s3fs"}.get(library, library)
    monkeypatch.setitem(sys.modules, library, None)
    said = refusal(path_of, f"{scheme}://bucket/x")
    assert said.startswith(f"{scheme}://bucket/x is reached by {library}, which is not installed: ")
    assert f"`pip install -e '.[{extra}]'`" in said


def test_what_must_be_here(bucket):
    assert storage.local_path("x/y", "file") == Path("x/y")
    assert refusal(storage.local_path, "gs://b/x", "file").startswith("--file=gs://b/x must be on")


def test_files_are_written_and_read_whole(bucket):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array("x")}
    found = files.read_npz(files.write_npz(bucket / "f.npz", arrays))
    assert found.keys() == arrays.keys()
    np.testing.assert_array_equal(found["a"], arrays["a"])
    assert files.read_json(bucket / "f.json") is None
    assert files.read_json(files.write_json(bucket / "f.json", {"a": 1})) == {"a": 1}
    files.write_text(bucket / "l", '{"a": 1}\n{"b"')
    assert files.read_json_lines(bucket / "l") == ([{"a": 1}], 1)
    assert storage.size(bucket / "l") == 13
    with pytest.raises(ZeroDivisionError), storage.taking_place(bucket / "l") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert (bucket / "l").read_text() == '{"a": 1}\n{"b"'


def test_a_state_is_gone_on_from(bucket):
    state = files.StateFile(str(bucket / "state.npz"), "me")
    assert state.load() is None
    state.save({"x": np.arange(3)})
    np.testing.assert_array_equal(
        files.StateFile(bucket / "state.npz", "me").load()["x"], [0, 1, 2]
    )
    with pytest.raises(ValueError, match="of another evaluation"):
        files.StateFile(bucket / "state.npz", "you").load()


def test_directories(bucket, tmp_path):
    for root in (bucket, tmp_path / "here"):
        assert not storage.is_whole(root / "d")
        with storage.taking_place_whole(root / "d") as place:
            (place / "e").mkdir(parents=True)
            (place / "e" / "f").write_text("x")
            assert not storage.is_whole(root / "d")
        assert storage.is_whole(root / "d") and (root / "d/e/f").read_text() == "x"
        storage.remove_tree(root / "d")
        storage.remove_tree(root / "d")
        assert not (root / "d").exists()
    files.write_text(bucket / "a" / "b" / "c", "x")
    files.write_text(bucket / "ab", "y")
    storage.move(bucket / "a", bucket / "z")
    assert list(storage.files_in(bucket)) == ["ab", "z/b/c"]


def test_copies_are_used_again_while_nothing_changes(bucket, tmp_path):
    files.write_text(bucket / "d" / "x.txt", "one")
    files.write_text(bucket / "d" / "e" / "y.txt", "two")
    copy, file = storage.local_copy(bucket / "d"), storage.local_copy(bucket / "d" / "x.txt")
    assert (copy.name, (copy / "e" / "y.txt").read_text()) == ("d", "two")
    assert (file.name, file.read_text()) == ("x.txt", "one")
    (copy / "marked").touch()
    assert (storage.local_copy(bucket / "d") / "marked").exists()
    files.write_text(bucket / "d" / "x.txt", "1.1")
    assert storage.local_copy(bucket / "d" / "x.txt").read_text() == "1.1"
    assert storage.local_copy(bucket / "d") != copy
    assert storage.local_copy(tmp_path) == tmp_path
    assert "does not exist, or holds nothing" in refusal(storage.local_copy, bucket / "none")


def test_a_copy_that_is_cut_short_is_none(bucket, tmp_path, monkeypatch):
    files.write_text(bucket / "x", "whole")
    monkeypatch.setattr(buckets.Buckets, "get_file", lambda s, _, file: Path(file).write_text("w"))
    assert "1 bytes of 5 came" in refusal(storage.local_copy, bucket / "x")
    assert list((tmp_path / "cache" / "advmoe_jax").iterdir()) == []


def test_a_copy_needs_room(bucket, monkeypatch):
    files.write_text(bucket / "x", "whole")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3}))
    assert "has 5 bytes" in refusal(storage.local_copy, bucket / "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "cannot be written: there is no such bucket"),
        (buckets.FORBIDDEN, "cannot be written: Forbidden: forbidden/f"),
        (buckets.UNREACHABLE, "cannot be written: Could not connect to the endpoint URL"),
    ],
)
def test_what_is_said_of_a_bucket_that_cannot_be_used(bucket, name, said):
    assert refusal(files.write_text, path_of(f"gs://{name}/f"), "") == f"gs://{name}/f {said}"


def test_errors_of_others_are_not_explained():
    assert storage.explanation(ValueError("x")) is None
    assert storage.explanation(buckets.ClientError("a\nb")) == "the storage cannot be reached: a b"
