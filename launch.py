"""`python launch.py model=gemma trainer.lr=1e-5`: the same as the installed command `podlaunch`."""

from launcher.app import main

if __name__ == "__main__":
    main()
