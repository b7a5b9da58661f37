"""`python -m rlad` is the command `rlad`, which Ctrl-C ends in one line from the first moment."""

import sys


def run() -> None:
    """Run the command line."""
    try:
        from rlad.cli.main import main

        main(prog_name="rlad")
    except KeyboardInterrupt:  # during the imports, which take longer than a finger
        print("rlad: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
