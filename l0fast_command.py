"""The entry point of the command `l0fast`. It imports nothing, so that Ctrl-C while the library is
loaded is one line, too."""


def main() -> int:
    """Runs the command; its exit code (see `l0fast.cli.main`)."""
    try:
        from l0fast.cli import main as command

        return command()
    except KeyboardInterrupt:
        import sys

        print("l0fast: interrupted", file=sys.stderr)
        return 130
