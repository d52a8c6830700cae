"""Every file of a checkpoint cut off, deleted, or with one byte flipped: the newest good checkpoint comes back, or none and an error."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.training.checkpoint import CheckpointError
from launcher.training.manifest import verify
from launcher.training.storage import COMMITTED, MANIFEST, LocalStorage
from tests.integration.checkpoint_states import check, open_checkpoints, save_all, state, target
from tests.integration.test_training_job import Recorder

STEPS = [20, 40, 60]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    save_all(folder, STEPS)
    return folder


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_first(path: Path) -> None:
    _flip(path, 0)


def flip_middle(path: Path) -> None:
    _flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    _flip(path, path.stat().st_size - 1)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [truncate, empty, flip_first, flip_middle, flip_last, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(good: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    files = files_of(good / "60")
    assert {str(file) for file in files} > {"_METADATA", "manifest.ocdbt", "about.json", MANIFEST, COMMITTED}
    assert any(file.parts[0] == "d" or "ocdbt.process_0" in file.parts for file in files)
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        damage(folder / "60" / file)
        recorder = Recorder()
        checkpoints = open_checkpoints(folder, recorder)
        # Orbax's mark is written by its commit, after the manifest; locally nothing depends on it
        step = 60 if file.name == COMMITTED else 40
        check(checkpoints.restore(target()), step)
        checkpoints.close()
        aside = [event["step"] for event in recorder.named("checkpoint_set_aside")]
        assert aside == ([] if step == 60 else [60]), file
        assert (folder / "60.bad-1").exists() == bool(aside), "renamed, never deleted"


def test_a_flipped_byte_anywhere_in_the_manifest_restores_no_other_values(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    path = folder / "60" / MANIFEST
    content = path.read_bytes()
    storage, unnoticed = LocalStorage(folder), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        unnoticed += verify(storage, "60") is None
    assert unnoticed <= len("version") + 1, "only the number of the format, which says nothing about the files"


def test_two_bad_ones_in_a_row_fall_back_two(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    flip_middle(folder / "60" / "about.json")
    (folder / "40" / MANIFEST).unlink()
    checkpoints = open_checkpoints(folder)
    check(checkpoints.restore(target()), 20)
    checkpoints.save(40, state(40))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["20", "40", "40.bad-1", "60.bad-1"]


def test_all_bad_is_an_error_that_names_the_folder_and_stays_one(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    for step in STEPS:
        flip_middle(max((folder / str(step)).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0))
    for _ in range(2):
        checkpoints = open_checkpoints(folder)
        with pytest.raises(CheckpointError, match=f"no usable checkpoint in {folder}: all were set aside") as caught:
            checkpoints.restore(target())
        assert "\n" not in str(caught.value)
        checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["20.bad-1", "40.bad-1", "60.bad-1"]
