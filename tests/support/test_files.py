import hashlib
import json

import pytest

from licq.support.errors import InputError
from licq.support.files import atomic_path, sha256, writable_folder, write_json, write_text


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ValueError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_of_infinities_is_valid_json(tmp_path):
    write_json(tmp_path / "a.json", {"psnr": float("inf"), "list": (1.5, float("nan")), "text": "é"})

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"psnr": None, "list": [1.5, None], "text": "é"}


def test_output_below_a_file_is_refused_early(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="`out`"):
        writable_folder(tmp_path / "file" / "out")
    assert writable_folder(tmp_path / "a" / "b").is_dir()


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    big = bytes(3 << 20)
    (tmp_path / "big").write_bytes(big)
    assert sha256(tmp_path / "big") == hashlib.sha256(big).hexdigest()
    with pytest.raises(InputError):
        sha256(tmp_path / "missing")
