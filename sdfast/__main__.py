"""`python -m sdfast`: the command line, as the `sdfast` command has it."""

from sdfast.cli import main

if __name__ == "__main__":
    main(prog_name="sdfast")
