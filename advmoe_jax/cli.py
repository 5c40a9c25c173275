"""How the commands speak: flags in, one line out for a user's mistake, exit code 2."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError

MISTAKE = 2
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

flags.disclaim_key_flags()  # --help lists a flag under the command that asked for it


def run(
    main: Callable[[], None],
    needs: tuple[str, ...],
    schema: config_lib.Schema | None = None,
) -> None:
    """Parses the command line and calls ``main``; does not return.

    Args:
        main: the command; reads ``absl.flags.FLAGS``.
        needs: flags that must be given.
        schema: what a command line may name of the command's config; None: that of a run.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            return _parse(argv, needs, config_lib.any_schema() if schema is None else schema)
        except UserError as error:
            _fail(str(error))

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
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

    # Libraries talk at INFO; people read the epochs. While flags are read, we say what is wrong.
    logging.set_verbosity(logging.ERROR)
    app.run(guarded, flags_parser=parse)


def _parse(argv: list[str], needs: tuple[str, ...], schema: config_lib.Schema) -> list[str]:
    for argument in argv[1:]:
        if argument.lstrip("-").startswith("config."):
            name = argument.lstrip("-").removeprefix("config.").split("=")[0]
            config_lib.check_name(name, schema)
    given = re.search(r"(?:^| )--?config[= ](\S+)", " ".join(argv))
    file = given and given[1].split(":")[0]
    if file and not (Path(file).is_file() and os.access(file, os.R_OK)):
        raise UserError(f"--config={file}: there is no such file, or it cannot be read")
    if file:  # a config may import its neighbours, as a script may
        sys.path.append(str(Path(file).absolute().parent))
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # the flags', or whatever the user's own Python file raises
        text = str(error).strip()
        quoted = "Traceback" in text  # ml_collections' way to report the latter
        text = " ".join(text.splitlines()[-1].split() if quoted else text.split())
        if quoted or not isinstance(error, flags.Error):
            text = f"--config={file} cannot be loaded: {text}"
        raise UserError(text) from None
    for name in needs:
        flag = flags.FLAGS[name]
        if not flag.present or not getattr(flag, "config_filename", flag.value):
            raise UserError(f"--{name} is missing; see --help")
    return rest


def workdir_flag(text: str) -> flags.FlagHolder[str | None]:
    """Defines ``--workdir``; several commands may be imported by one program."""
    return flags.DEFINE_string("workdir", None, text, allow_override=True)


def config_flag(default: str | None = None) -> None:
    """Defines ``--config``, a file's path, and its overrides ``--config.x.y=...``."""
    text = "config file; --config.x.y=... overrides"
    config_flags.DEFINE_config_file("config", default, text, allow_override=True)


def config_value(check: Callable[[ConfigDict], None] = config_lib.check) -> ConfigDict:
    """The config of the command line, complete and well typed.

    Args:
        check: raises UserError unless the config is what the command needs.

    Raises:
        UserError: if the file does not give a valid config.
    """
    config = flags.FLAGS.config
    if not isinstance(config, ConfigDict):
        file = flags.FLAGS["config"].config_filename
        raise UserError(f"--config={file}: get_config() must return a ConfigDict")
    check(config)
    return config


def is_typed(name: str) -> bool:
    """Whether the command line gives the config's value of that dotted name."""
    start = f"config.{name}"
    return any(x.lstrip("-").split("=")[0] == start for x in sys.argv[1:] if x.startswith("-"))


def _fail(message: str) -> None:
    # Straight to the exit: threads that still write must not add a traceback of their own.
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(MISTAKE)
