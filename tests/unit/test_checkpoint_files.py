"""Manifests, local storage and retention of checkpoints: what counts, what is left over, what may go. No JAX, no Orbax."""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.training.manifest import compare, read_about, seal, share_of, verify
from launcher.training.retention import Retention
from launcher.training.storage import MANIFEST, Facts, LocalStorage, StorageError, is_damage, open_storage

MEANING = {"trainer.seed": 3}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """With one sealed checkpoint, of step 20."""
    (tmp_path / "20" / "d").mkdir(parents=True)
    (tmp_path / "20" / "d" / "weights").write_bytes(b"0123456789")
    (tmp_path / "20" / "_METADATA").write_text("{}")
    made = LocalStorage(tmp_path)
    seal(made, "20", 20, MEANING)
    return made


def test_a_manifest_agrees_with_untouched_files(storage: LocalStorage) -> None:
    assert verify(storage, "20") is None
    assert read_about(storage, "20") == MEANING


def test_a_manifest_holds_the_checksums_of_cloud_storage(storage: LocalStorage, tmp_path: Path) -> None:
    entry = json.loads((tmp_path / "20" / MANIFEST).read_text())["files"]["d/weights"]
    assert entry == {"bytes": 10, "crc32c": "KAwGng=="}  # crc32c("0123456789") = 280c069e


def test_flipped_bytes_truncation_and_missing_files_are_found(storage: LocalStorage, tmp_path: Path) -> None:
    weights = tmp_path / "20" / "d" / "weights"
    weights.write_bytes(b"0123456780")
    assert verify(storage, "20") == "the checksum of d/weights does not agree"
    weights.write_bytes(b"012")
    assert verify(storage, "20") == "d/weights has 3 bytes instead of 10"
    weights.unlink()
    assert verify(storage, "20") == "d/weights is missing"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {}, "step": 20}', "\xff\xfe"])
def test_a_damaged_manifest_is_a_reason_not_a_crash(storage: LocalStorage, tmp_path: Path, text: str) -> None:
    (tmp_path / "20" / MANIFEST).write_text(text)
    assert verify(storage, "20") == "its manifest is damaged"


def test_no_manifest_is_a_reason(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "20" / MANIFEST).unlink()
    assert verify(storage, "20") == "it has no manifest"


def test_a_checkpoint_under_the_name_of_another_step_is_refused(storage: LocalStorage) -> None:
    storage.rename("20", "40")
    assert verify(storage, "40") == "it is the checkpoint of step 20"


def test_the_hosts_together_find_what_one_finds(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "20" / "d" / "weights").write_bytes(b"0123456780")
    reasons = [verify(storage, "20", index, 3) for index in range(3)]
    assert [reason for reason in reasons if reason] == ["the checksum of d/weights does not agree"]


@given(st.dictionaries(st.text("ab/", min_size=1, max_size=6), st.integers(0, 1000), max_size=12), st.integers(1, 5))
def test_every_file_is_the_share_of_exactly_one_host(sizes: dict[str, int], count: int) -> None:
    files = {name: Facts(size, "") for name, size in sizes.items()}
    shares = [share_of(files, index, count) for index in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(sizes[name] + 1 for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0) + 1


def test_extra_files_are_no_harm() -> None:
    assert compare({"a": Facts(1, "x")}, {"a": Facts(1, "x"), "b": Facts(2, "y")}) is None


def test_what_a_killed_process_left_is_told_from_checkpoints(storage: LocalStorage, tmp_path: Path) -> None:
    for name in ("40.orbax-checkpoint-tmp", "40.orbax-checkpoint-tmp-17", "1.deleting", "10.bad-1", "notes"):
        (tmp_path / name).mkdir()
    assert sorted(storage.leftovers()) == ["1.deleting", "40.orbax-checkpoint-tmp", "40.orbax-checkpoint-tmp-17"]
    for name in storage.leftovers():
        storage.remove(name)
    assert sorted(storage.names()) == ["10.bad-1", "20", "notes"]


def test_a_folder_that_is_being_deleted_never_looks_like_a_checkpoint(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        (path / "d" / "weights").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            storage.remove("20")
    assert storage.leftovers() == ["20.deleting"]


def test_only_a_medium_that_cannot_be_read_makes_a_checkpoint_bad() -> None:
    assert is_damage(OSError(errno.EIO, "Input/output error"))
    assert not is_damage(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_damage(TimeoutError())


def test_an_unknown_kind_of_place_is_refused() -> None:
    with pytest.raises(StorageError, match="use a local path or gs://"):
        open_storage("s3://bucket/run")


@pytest.mark.parametrize(
    ("retention", "steps", "gone"),
    [
        (Retention(3), [20, 40, 60, 80], [20]),
        (Retention(3), [20, 40], []),
        (Retention(1), [80, 20, 40], [20, 40]),
        (Retention(1, every=40), [20, 40, 60, 80, 100], [20, 60]),
        (Retention(1, every=50), [20, 40, 60, 80, 100, 120], [20, 40, 80]),  # 60 is the first at or after 50
        (Retention(2, every=1000), [20, 40, 60], [20]),
        (Retention(1), [], []),
    ],
)
def test_the_newest_and_the_milestones_are_kept(retention: Retention, steps: list[int], gone: list[int]) -> None:
    assert retention.superfluous(steps) == gone


@given(st.sets(st.integers(1, 500), max_size=30), st.integers(1, 4), st.none() | st.integers(1, 100))
def test_keeping_step_by_step_keeps_what_keeping_at_the_end_keeps(steps: set[int], last: int, every: int | None) -> None:
    retention = Retention(last, every)
    there: list[int] = []
    for step in sorted(steps):
        there.append(step)
        there = [kept for kept in there if kept not in retention.superfluous(there)]
    assert there == [step for step in sorted(steps) if step not in retention.superfluous(steps)]
