"""How the commands speak: flags in, one line out for a user's mistake, exit code 2."""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from logging import Formatter, LogRecord
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax import hosts, storage
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.wanted import number
from advmoe_jax.usage import usage

MISTAKE = 2
_INTERRUPTED = 128 + signal.SIGINT
_HELP = frozenset({"--help", "-help", "-h", "-?", "--h"})
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

flags.disclaim_key_flags()  # --help lists a flag under the command that asked for it


def run(
    main: Callable[..., None],
    needs: tuple[str, ...] = (),
    schema: config_lib.Schema | None = None,
    takes: str = "",
) -> None:
    """Parses the command line and calls ``main``; does not return.

    Args:
        main: the command; reads ``absl.flags.FLAGS``.
        needs: flags that must be given.
        schema: what a command line may name of the command's config; None: that of a run.
        takes: what words without a flag are, such as ``directories``: ``main`` is called with
            them, one at least. Empty: there must be none.
    """
    module = sys.modules[main.__module__]

    def parse(argv: list[str]) -> list[str]:
        if not _HELP.isdisjoint(argv[1:]):
            print(usage(module.__doc__ or "", flags.FLAGS.get_flags_for_module(module)))
            sys.stdout.flush()
            os._exit(0)
        try:
            return _parse(argv, needs, config_lib.any_schema() if schema is None else schema)
        except UserError as error:
            _fail(str(error))

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            if argv[1:] and not takes:
                raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
            if takes and not argv[1:]:
                raise UserError(f"no {takes} are named; see --help")
            main(*[argv[1:]] if takes else [])
        except KeyboardInterrupt as error:
            _show_if_debugging(error)
            _end("interrupted; what was saved is kept: the same command goes on", _INTERRUPTED)
        except Exception as error:
            if not isinstance(error, UserError | OSError):
                hosts.await_verdict()
            if (line := _explained(error)) is None:
                hosts.fail(f"{type(error).__name__}: {error}", 1)
                raise
            _show_if_debugging(error)
            _fail(line)

    help_text = "show the traceback of an error, too"
    flags.DEFINE_bool("debug", False, help_text, allow_override=True)
    # Libraries talk at INFO; people read the epochs. While flags are read, we say what is wrong.
    logging.set_verbosity(logging.ERROR)
    logging.get_absl_handler().setFormatter(_Plain())
    app.run(guarded, flags_parser=parse)


class _Plain(Formatter):
    """``warning: ...``, without time, file and line: what a person needs of a log's record."""

    def format(self, record: LogRecord) -> str:
        """The record in one line."""
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


def _config_file(argv: list[str]) -> str:
    """The file of ``--config=FILE[:words]``, or of ``--config FILE``; empty if there is none."""
    given = ""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument in ("--config", "-config"):
            given = following
        elif match := re.match(r"--?config=(.*)", argument, re.DOTALL):
            given = match[1]
    return given.split(":")[0]


def _parse(argv: list[str], needs: tuple[str, ...], schema: config_lib.Schema) -> list[str]:
    for argument in argv[1:]:
        if argument.lstrip("-").startswith("config."):
            name = argument.lstrip("-").removeprefix("config.").split("=")[0]
            config_lib.check_name(name, schema)
    argv = [argv[0], *(_with_decimals(argument, schema) for argument in argv[1:])]
    file = _config_file(argv)
    if file and not (Path(file).is_file() and os.access(file, os.R_OK)):
        raise UserError(f"--config={file}: there is no such file, or it cannot be read")
    if file:  # a config may import its neighbours, as a script may
        sys.path.append(str(Path(file).absolute().parent))
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        if file and not any(re.match("--?help", argument) for argument in argv[1:]):
            raise UserError(f"--config={file} cannot be loaded: it ends the program") from None
        sys.stdout.flush()
        os._exit(0)  # help was asked for, and given
    except Exception as error:  # the flags', or whatever the user's own Python file raises
        text = str(error).strip()
        quoted = "Traceback" in text  # ml_collections' way to report the latter
        text = " ".join(text.splitlines()[-1].split() if quoted else text.split())
        group = text.strip("'\"") if isinstance(error, KeyError) else ""
        if group and (names := [a for a in argv if f".{group}" in a and "config." in a]):
            name = names[0].lstrip("-").split("=")[0]
            text = f"{name} does not exist: networks of this config's family have no {group!r}"
        elif quoted or not isinstance(error, flags.Error):
            text = f"--config={file} cannot be loaded: {text}"
        raise UserError(text) from None
    require(*needs)
    return rest


def require(*names: str) -> None:
    """Raises UserError unless the command line gives these flags a value."""
    for name in names:
        flag = flags.FLAGS[name]
        if not flag.present or not getattr(flag, "config_filename", flag.value):
            raise UserError(f"--{name} is missing; see --help")


def _with_decimals(argument: str, schema: config_lib.Schema) -> str:
    """``--config.attack.epsilon=8/255`` with the fraction worked out; others as they are."""
    flag, _, text = argument.partition("=")
    name = flag.lstrip("-").removeprefix("config.")
    is_fraction = flag.startswith("-") and flag.lstrip("-") != name and "/" in text
    if not is_fraction or config_lib.type_of(name, schema) is not float:
        return argument
    value = number(text)
    return argument if value is None else f"{flag}={value!r}"


def workdir_flag(text: str) -> flags.FlagHolder[str | None]:
    """Defines ``--workdir``; several commands may be imported by one program."""
    return flags.DEFINE_string("workdir", None, text, allow_override=True)


def host_flags() -> Callable[[], None]:
    """Defines ``--coordinator``, ``--num_processes`` and ``--process_id``.

    Returns:
        What joins the other processes that the flags tell of, if there are any.
    """
    address = flags.DEFINE_string(
        "coordinator",
        "",
        "several hosts: address:port of the first, or 'auto' on TPU and SLURM",
        allow_override=True,
    )
    count, index = (
        flags.DEFINE_integer(name, None, f"several hosts: {text}", allow_override=True)
        for name, text in (
            ("num_processes", "how many processes"),
            ("process_id", "which one this is"),
        )
    )
    return lambda: hosts.join(address.value, count.value, index.value)


def config_flag(default: str | None = None) -> None:
    """Defines ``--config``, a file's path, and its overrides ``--config.x.y=...``."""
    text = "config file; --config.x.y=... sets one of its values"
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


def stopped(by: signal.Signals, message: str, console: Console) -> None:
    """Says that a run was told to stop and has saved.

    SIGTERM is the cluster's, which asks for nothing else: exit code 0. After Ctrl-C it is 130, and
    this does not return.
    """
    if by == signal.SIGINT:
        _end(message, _INTERRUPTED)
    console.print(message)


def _explained(error: Exception) -> str | None:
    """What is wrong with the machine or the user's words, in one line; None: we are."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return str(error)
    if said := storage.explanation(error):
        return f"{said}; what was saved is kept: the same command goes on"
    if isinstance(error, OSError):
        if error.filename is None and error.errno is None:  # of a bucket
            return f"cannot read or write: {text}"
        where = error.filename or "the working directory"
        if error.errno in _DISK_FULL:
            return f"disk full: cannot write {where}; free some space and run the command again"
        return f"cannot read or write {where}: {error.strerror or text}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return (
            f"out of memory ({text or 'no details'}): try smaller batches (batch_size, "
            "microbatches, evaluation.batch_size), a smaller network or fewer images"
        )
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename.endswith("xla_bridge.py"):
        asked = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"JAX cannot start on JAX_PLATFORMS={asked!r} ({text or 'there is no such device'}): "
            "unset it to use what there is, or install JAX for that device"
        )
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"JAX failed: {text}; --debug shows where"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _show_if_debugging(error: BaseException) -> None:
    if flags.FLAGS.debug:
        traceback.print_exception(error)


def _fail(message: str) -> None:
    _end(f"error: {message}", MISTAKE)


def _end(message: str, code: int) -> None:
    hosts.fail(message.removeprefix("error: "), code)
    # Straight to the exit: threads that still write must not add a traceback of their own.
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
