"""What every command shares: one line for a user's mistake, exit code 2, never a traceback."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from jax_repaint.errors import InputError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(argv)` under absl; an `InputError` becomes `error: ...` on stderr and exit code 2."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; options are written --name=value")
        try:
            main(argv)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(list(argv))
        except (flags.Error, InputError, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            sys.exit(2)

    # `python -m jax_repaint.train` loads the file as __main__; absl then shows its module flags in --help.
    app.run(guarded, flags_parser=parse)
