"""How the commands speak: flags in, one line out for a user's mistake, exit code 2."""

import errno
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError

MISTAKE = 2
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[], None], needs: tuple[str, ...]) -> None:
    """Parses the command line and calls ``main``; does not return.

    Args:
        main: the command; reads ``absl.flags.FLAGS``.
        needs: flags that must be given.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return _parse(argv, needs)
        except UserError as error:
            _fail(str(error))

    def guarded(argv: list[str]) -> None:
        try:
            if argv[1:]:
                raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
            main()
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            where = error.filename or "the working directory"
            _fail(f"disk full: cannot write {where}; free some space and run the command again")

    logging.set_verbosity(logging.WARNING)  # libraries talk at INFO; people read the epochs
    app.run(guarded, flags_parser=parse)


def _parse(argv: list[str], needs: tuple[str, ...]) -> list[str]:
    for argument in argv[1:]:
        if argument.lstrip("-").startswith("config."):
            config_lib.check_name(argument.lstrip("-").removeprefix("config.").split("=")[0])
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UserError(" ".join(str(error).split())) from None
    for name in needs:
        if not flags.FLAGS[name].present:
            raise UserError(f"--{name} is missing; see --help")
    return rest


def config_flag() -> None:
    """Defines ``--config`` and its overrides ``--config.x.y=...``."""
    config_flags.DEFINE_config_file("config", None, "config file; --config.x.y=... overrides")


def config_value() -> ConfigDict:
    """The config of the command line, complete and well typed.

    Raises:
        UserError: if the file cannot be loaded or is not a valid config.
    """
    try:
        config = flags.FLAGS.config
        config.to_dict()
    except Exception as error:  # whatever the user's own Python file raises
        path = flags.FLAGS["config"].value
        raise UserError(f"--config: cannot load {path}: {error}".replace("\n", " ")) from None
    config_lib.check(config)
    return config


def _fail(message: str) -> None:
    # Straight to the exit: threads that still write must not add a traceback of their own.
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(MISTAKE)
