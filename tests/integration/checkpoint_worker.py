"""`python -m tests.integration.checkpoint_worker FOLDER SPLIT ACTION...`: one process of several, saving and restoring a tiny state.

    save=STEP      start saving; says "saving"
    wait           until it counts; says "saved", or the error and ends with 3
    restore=STEP   what `restore` must give, every number of it; 0 is none at all
    stdin          wait for a line

SAVE_LIMIT_S of the environment bounds a save.
"""

import os
import sys

from launcher.training.child import Gang, connect, disconnect


def main() -> None:
    folder, split, actions = sys.argv[1], sys.argv[2] == "split", sys.argv[3:]
    gang = Gang.from_environment()
    connect(gang)
    from launcher.training.checkpoint import CheckpointError
    from tests.integration.checkpoint_states import check, open_checkpoints, state, target

    checkpoints = open_checkpoints(folder, save_limit_s=int(os.environ.get("SAVE_LIMIT_S", "60")))
    try:
        for action in actions:
            name, _, value = action.partition("=")
            if name == "save":
                checkpoints.save(int(value), state(int(value), split=split))
                say("saving")
            elif name == "wait":
                checkpoints.wait()
                say("saved")
            elif name == "stdin":
                say("waiting")
                sys.stdin.readline()
            elif int(value) == 0:
                assert checkpoints.restore(target(split=split)) is None
            else:
                check(checkpoints.restore(target(split=split)), int(value))
                say(f"restored {value}")
        checkpoints.close()
    except CheckpointError as error:
        say(str(error))
        os._exit(3)
    disconnect(gang)
    os._exit(0)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
