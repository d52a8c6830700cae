"""Counts five steps a second, goes on from the count that was kept, and ends when the run directory holds the file `enough`."""

import os
import time
from pathlib import Path

from launcher.training import script


def main() -> None:
    enough = Path(os.environ["PODLAUNCH_RUN_DIR"], "enough")
    kept = script.checkpoint_dir() / "step"
    step = int(kept.read_text()) if kept.exists() else 0
    while not enough.exists() and not script.preempted():
        time.sleep(0.2)
        step += 1
        script.report(step, loss=1 / step)
        if os.environ["JAX_PROCESS_ID"] == "0":
            fresh = kept.with_suffix(".new")
            fresh.write_text(str(step))
            fresh.replace(kept)


if __name__ == "__main__":
    main()
