"""What every command shares: one line for a user's mistake, exit code 2, never a traceback."""

import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import tqdm
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jax_repaint import distributed, files
from jax_repaint.errors import InputError

HELP = ("h", "help", "helpshort", "helpfull", "helpxml", "?")
SECONDS_A_LINE = 120.0
# What Python and absl say of a value of another type, and what a person would.
TYPES = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is no whole number",
    r"could not convert string to float: (.*)": r"\1 is no number",
    r"\('Non-boolean argument to boolean flag', (.*)\)": r"\1 is neither true nor false",
}


def run(main: Callable[[Sequence[str]], None], positional: int = 0) -> None:
    """Runs `main(argv)` under absl; `InputError` and `OSError` become `error: ...` and exit code 2, Ctrl-C 130.

    Args:
      positional: most arguments that are not options.
    """

    def guarded(argv: Sequence[str]) -> None:
        handler = absl_logging.get_absl_handler()
        handler.addFilter(_of_interest)
        handler.setFormatter(logging.Formatter("%(message)s"))
        try:
            if len(argv) > 1 + positional:
                raise InputError(f"unexpected argument {argv[1 + positional]!r}; options are written --name=value")
            distributed.use_cores()
            main(argv)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
        except OSError as e:
            # A full disk, missing rights, a name that is too long: the system says all that there is to say.
            place = f"cannot use {e.filename}: " if e.filename else ""
            print(f"error: {place}{e.strerror or e}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(["--help" if one == "-h" else one for one in argv])
            if "config" in flags.FLAGS:
                _check_kind(flags.FLAGS.config)
            return rest
        except Exception as e:
            # Configurations are programs of the user's, which raise anything.
            print(f"error: {_one_line(e)}", file=sys.stderr)
            sys.exit(2)
        except SystemExit:
            # After absl's help, which ends with 1.
            sys.exit(0 if any(one.lstrip("-") in HELP for one in argv[1:]) else 1)

    # `python -m jax_repaint.train` loads the file as __main__; absl then shows its module flags in --help.
    app.run(guarded, flags_parser=parse)


class _Lines:
    """Stderr, for what writes over its own line there; a line that says nothing new is left out."""

    last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            self.last = line
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, desc: str, unit: str, shown: bool = True, **options) -> tqdm.tqdm:
    """A bar on a terminal; in a log, of what takes minutes, a line now and then."""
    if not shown or sys.stderr.isatty():
        return tqdm.tqdm(total=total, desc=desc, unit=unit, disable=not shown, **options)
    return tqdm.tqdm(
        total=total, desc=desc, unit=unit, file=_Lines(), miniters=1, mininterval=SECONDS_A_LINE, delay=SECONDS_A_LINE,
        bar_format="{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left{postfix}", **options
    )  # fmt: skip


def keep_programs(folder: str) -> None:
    """Keeps compiled programs in a folder for other runs; JAX makes it.

    Raises:
      InputError: it cannot be that folder, which JAX would only warn of.
    """
    files.check_makeable(Path(folder), f"--cache={folder}")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _check_kind(config: ConfigDict) -> None:
    # A file that could not be loaded says so only when it is used.
    getattr(config, "items", None)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise InputError(f"--config: get_config of the file must return a ConfigDict, not {kind}")


def _one_line(e: Exception) -> str:
    text = str(e).strip()
    if isinstance(e, SyntaxError):
        return f"{e.filename}, line {e.lineno}, is not Python ({e.msg}); give a file such as configs/small.py"
    if isinstance(e, flags.Error):
        for theirs, ours in TYPES.items():
            text = re.sub(theirs, ours, text)
    if isinstance(e, AttributeError | KeyError):
        if getattr(e, "name", None) == "get_config":
            return "--config: the file has no get_config, as those in configs/ have"
        words = text.strip("\"'") if text[:1] == text[-1:] else text
        return f"the configuration cannot be overridden: {words if ' ' in words else f'no setting {words!r}'}"
    if isinstance(e, OSError):
        # The flag says why it could not load a file when its configuration is used.
        reason = re.sub(r"^.*(\[Errno \d+\]|failure to load:) ", "", text.splitlines()[-1]).rstrip(".")
        return f"--config: {reason}; give a file such as configs/small.py"
    if not isinstance(e, flags.Error | ValueError | TypeError | ImportError):
        at = traceback.extract_tb(e.__traceback__)[-1]
        return f"{at.filename}, line {at.lineno}: {' '.join(text.split()) or type(e).__name__}"
    if "Traceback" in text:
        # The flag wraps what went wrong in whole tracebacks.
        text = re.sub(r"^[\w.]+(Error|Exception): ", "", text.splitlines()[-1].strip())
    return " ".join(text.split())


def _of_interest(record: logging.LogRecord) -> bool:
    """This package's own messages, and other libraries' warnings."""
    return record.levelno >= logging.WARNING or Path(__file__).parent in Path(record.pathname).parents
