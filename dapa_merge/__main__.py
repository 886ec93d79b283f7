"""Runs the command line: `python -m dapa_merge` is `dapa-merge`."""

from dapa_merge.cli import main

if __name__ == "__main__":
    main()
