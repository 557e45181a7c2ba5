"""Lets ``python -m fastconv`` do what the ``fastconv`` command does."""

from fastconv.cli import main

if __name__ == "__main__":
    main(prog_name="fastconv")
