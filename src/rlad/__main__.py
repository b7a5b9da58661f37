"""`python -m rlad` is the command `rlad`."""

from rlad.cli.main import main

if __name__ == "__main__":
    main(prog_name="rlad")
