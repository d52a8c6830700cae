"""The shell blocks of a document, as statements that a reader types one after another."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?P<notes>(?:<!-- [^\n]* -->\n)*)```(?:bash|sh|shell|console)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_EXCUSE = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    document: str
    """As seen from the root of the repository."""
    number: int
    text: str
    excuse: str | None
    """Why it is not run: the comment before it, which no reader sees."""

    @property
    def id(self) -> str:
        return f"{self.document}:{self.number}"


def blocks(document: Path) -> list[Block]:
    name = str(document.relative_to(ROOT))
    found = list(_BLOCK.finditer(document.read_text()))
    excuses = [_EXCUSE.search(block["notes"]) for block in found]
    return [Block(name, i, block["text"], excuse and excuse[1]) for i, (block, excuse) in enumerate(zip(found, excuses, strict=True))]


def statements(text: str) -> Iterator[str]:
    """What bash takes as one: lines that a backslash, a loop or a here-document joins stay together."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append(line)
        if not _goes_on("\n".join(lines)):
            if (whole := "\n".join(lines)).strip():
                yield whole
            lines = []
    if lines:
        raise ValueError(f"bash does not take this as a statement: {' / '.join(lines)}")


def _goes_on(text: str) -> bool:
    """Bash only warns of a here-document without its end."""
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return text.endswith("\\") or bool(checked.returncode or checked.stderr)
