"""Fine-tunes a small Gemma of our own on a dictionary, all weights and LoRA, and draws how each learns.

    apt-get download dict-jargon && dpkg-deb -x dict-jargon_*.deb jargon     # the Jargon File, 2,307 entries, public domain
    python examples/jargon.py --dictionary jargon/usr/share/dictd --figure jargon.svg

Three runs of `python -m launcher.training`, one process without a cluster; the commands are printed as they are run. The first trains on
the source code of Python's library and exports a model; the others go on from that model with the dictionary, of which 2 % is held out.
The last line is one JSON object with the held-out losses.
"""

import argparse
import gzip
import json
import os
import shlex
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DICTIONARY = Path("/usr/share/dictd")
BASE, FULL, LORA = "jargon-base", "jargon-full", "jargon-lora"
BASE_STEPS, STEPS = 150, 100
EVALUATIONS = 5
"""Of the held-out loss during each run, the last among them."""
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(term, definition) of every entry, in the format of dictd: an index of offsets and lengths, and a gzip file of all texts."""
    texts = gzip.decompress((folder / "jargon.dict.dz").read_bytes())
    for line in (folder / "jargon.index").read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")
        if not word.startswith("00-database"):
            first = _number(start)
            term, _, definition = texts[first : first + _number(length)].decode().strip().partition("\n")
            yield term, "\n".join(line.removeprefix("    ") for line in definition.strip().splitlines())


def _number(digits: str) -> int:
    """Of base 64, the most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def write_records(folder: Path, path: Path) -> int:
    """One JSON object a line, as data=jsonl takes them: the term is read, the definition is learned."""
    records = [{"prompt": f"{term}\n", "response": definition} for term, definition in entries(folder) if definition.strip()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return len(records)


def commands(records: Path, root: Path, base_steps: int, steps: int) -> dict[str, list[str]]:
    """Name of a run -> its command."""
    tuned = ["data=jsonl", f"data.path={records}", f"model.weights={root}/{BASE}/export"]
    own = {
        BASE: [*_length(base_steps)],
        FULL: [*tuned, *_length(steps), "trainer.lr=1e-3"],
        LORA: [*tuned, *_length(steps), "trainer.lr=1e-2", "model.lora.rank=16"],
    }
    common = [f"run.root={root}", "trainer.checkpoint_every=1000"]
    return {name: ["python", "-m", "launcher.training", f"run.name={name}", *settings, *common] for name, settings in own.items()}


def _length(steps: int) -> tuple[str, str]:
    return f"trainer.steps={steps}", f"trainer.eval_every={max(1, steps // EVALUATIONS)}"


def held_out(run: Path) -> dict[int, float]:
    """Step -> held-out loss, nats a token (here a byte)."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}


def draw(base: dict[int, float], tuned: dict[str, dict[int, float]], figure: Path) -> None:
    """Two panels: the run on Python's code, and those on the dictionary that begin with what it exported."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "jargon", "svg.fonttype": "none"}):  # the same file for the same curves
        plot = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = plot.subplots(1, 2)
        for axes, title, curves in ((left, "Python's library", {"base": base}), (right, "then the Jargon File", tuned)):
            for name, curve in curves.items():
                axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=name)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend()
        left.set_ylabel("held-out loss, nats a byte")
        plot.savefig(figure, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", type=Path, default=DICTIONARY, help="the folder with jargon.index and jargon.dict.dz")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each fine-tuning")
    parser.add_argument("--figure", type=Path, help="an SVG file; needs matplotlib: pip install matplotlib")
    arguments = parser.parse_args()
    if not (arguments.dictionary / "jargon.index").exists():
        sys.exit(f"there is no jargon.index in {arguments.dictionary}: unpack Debian's dict-jargon and give its folder with --dictionary")
    arguments.root.mkdir(parents=True, exist_ok=True)
    records = arguments.root / "jargon.jsonl"
    print(f"{write_records(arguments.dictionary, records)} records in {records}", flush=True)
    began = time.monotonic()
    for name, command in commands(records, arguments.root, arguments.base_steps, arguments.steps).items():
        print(f"\n$ {shlex.join(command)}", flush=True)
        if code := subprocess.run([sys.executable, *command[1:]], check=False).returncode:
            sys.exit(f"{name} ended with exit code {code}")
    spent, seconds = os.times(), time.monotonic() - began
    base = held_out(arguments.root / BASE)
    tuned = {"all weights": held_out(arguments.root / FULL), "LoRA, rank 16": held_out(arguments.root / LORA)}
    if arguments.figure:
        draw(base, tuned, arguments.figure)
    result = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(spent.children_user + spent.children_system, 1),
        "base_steps": arguments.base_steps,
        "steps": arguments.steps,
    }
    print(json.dumps(result | {name: ends(curve) for name, curve in {"base": base, **tuned}.items()}))


def ends(curve: dict[int, float]) -> dict[str, float]:
    """Before the first step and after the last."""
    before, after = curve[min(curve)], curve[max(curve)]
    return {"before": round(before, 4), "after": round(after, 4), "improved": round(1 - after / before, 4)}


if __name__ == "__main__":
    main()
