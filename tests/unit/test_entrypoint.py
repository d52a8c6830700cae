"""The command line of a user's own program, and which file it means."""

from pathlib import Path

import pytest

from launcher.entrypoint import Entrypoint, parse_entrypoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.py", Entrypoint("train.py", None, ())),
        ("./sub/train.py --x 1", Entrypoint("sub/train.py", None, ("--x", "1"))),
        ("train.py --name 'two words' --lr=1e-3", Entrypoint("train.py", None, ("--name", "two words", "--lr=1e-3"))),
        ("python train.py -m", Entrypoint("train.py", None, ("-m",))),
        ("python3 -m project.train --x 1", Entrypoint(None, "project.train", ("--x", "1"))),
        ("-m train", Entrypoint(None, "train", ())),
    ],
)
def test_a_command_line_names_a_program_and_its_arguments(text: str, expected: Entrypoint) -> None:
    assert parse_entrypoint(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "names no program"),
        ("python", "names no program"),
        ("train.py 'x", "No closing quotation"),
        ("-m", "-m wants the name of a module"),
        ("-m a/b.py", "-m wants the name of a module"),
        ("python -u train.py", "-u is an option of the interpreter"),
        ("run.sh --x", "run.sh is no Python program"),
        ("/home/me/train.py", "outside of the code"),
        ("../train.py", "outside of the code"),
    ],
)
def test_what_starts_no_python_program_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_entrypoint(text)


def test_the_file_of_a_program_is_found(tmp_path: Path) -> None:
    for name in ("train.py", "project/tools/run.py", "project/tools/cli/__main__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert parse_entrypoint("train.py").find(tmp_path) == tmp_path / "train.py"
    assert parse_entrypoint("-m project.tools.run").find(tmp_path) == tmp_path / "project/tools/run.py"
    assert parse_entrypoint("-m project.tools.cli").find(tmp_path) == tmp_path / "project/tools/cli/__main__.py"
    assert parse_entrypoint("-m project.tools").find(tmp_path) is None
    assert parse_entrypoint("other.py").find(tmp_path) is None
