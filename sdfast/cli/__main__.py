"""`python -m sdfast.cli`: the command line, as `python -m sdfast` has it."""

from sdfast.cli import main

if __name__ == "__main__":
    main(prog_name="sdfast")
