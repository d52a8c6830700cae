"""`python -m launcher.training`: train in this process alone (launcher/alone.py)."""

from launcher.alone import main

if __name__ == "__main__":
    main()
