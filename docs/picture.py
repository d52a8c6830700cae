"""Draws what a command prints, as a terminal shows it. The picture of README.md is a run of which one process is killed on its way:

    python docs/picture.py docs/run.svg podlaunch model=gemma trainer.checkpoint_every=10 run.name=mine

and meanwhile `kill -9` to the second of the processes that its events.jsonl names.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 120


def draw(title: str, text: str) -> str:
    """An SVG that loads nothing: with the fonts that are there."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(text))
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)


def main() -> None:
    place, *command = sys.argv[1:]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    Path(place).write_text(draw("podlaunch", f"$ {' '.join(command)}\n{done.stdout.rstrip()}"), encoding="utf-8")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
