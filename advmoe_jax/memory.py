"""What fits into memory: bytes are counted before they are asked for.

An allocation that is far too large does not always fail: the system may promise the memory, and end
the process when it is used.
"""

import os

from advmoe_jax.errors import UserError


def machine_bytes() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(what: str, size: int, remedy: str) -> None:
    """Raises UserError if something is larger than the memory of this machine.

    Args:
        what: needs the memory, such as ``1,797 images of 20000x20000``.
        size: bytes that it needs at the least.
        remedy: what the user can do, such as ``set a smaller image_size``.
    """
    bound = machine_bytes()
    if size > bound:
        raise UserError(
            f"{what} would need {_gibibytes(size)} of memory at the least, and this machine has "
            f"{_gibibytes(bound)}: {remedy}"
        )


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
