"""Where the first process of a run is, how many there are, and which one this is."""

import re
from typing import NamedTuple

from jax._src.clusters import ClusterEnv

from advmoe_jax.errors import UserError

AUTO = "auto"


class Place(NamedTuple):
    """A process's place in its run.

    Attributes:
        host: of the first process.
        port: where it listens.
        count: how many processes there are.
        index: which one this is.
    """

    host: str
    port: int
    count: int
    index: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def located(address: str, count: int | None, index: int | None) -> Place | None:
    """This process's place in a run of several, as flags say it; None in a run of one.

    Args:
        address: ``address:port``, ``auto`` or empty; see ``hosts.join``.
        count: how many processes there are; None: not said.
        index: which one this is; None: not said.

    Raises:
        UserError: if the three do not go together, or the cluster says nothing.
    """
    if address == AUTO:
        address, count, index = _of_cluster(count, index)
    if not address:
        for name, value in (("num_processes", count), ("process_id", index)):
            if value is not None:
                raise UserError(
                    f"--{name}={value} is of a run of several processes: it needs "
                    "--coordinator=address:port too"
                )
        return None
    port = re.fullmatch(r"(.+):(\d{1,5})", address)
    if not port or not 0 < int(port[2]) < 2**16:
        raise UserError(f"--coordinator={address} must be address:port, or auto")
    if count is None or index is None:
        raise UserError(
            f"--coordinator={address} needs --num_processes and --process_id too; or give "
            "--coordinator=auto on TPU and SLURM"
        )
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must lie in 0 to {count - 1}, of {count} processes")
    return Place(port[1].strip("[]"), int(port[2]), count, index)


def _of_cluster(count: int | None, index: int | None) -> tuple[str, int | None, int | None]:
    """What JAX finds in the environment of a cluster that it knows."""
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, count, index, None, None, 300
    )
    if address is None:
        raise UserError(
            "--coordinator=auto: this is no TPU slice, no SLURM job and no other cluster that JAX "
            "knows; give address:port of the first process, --num_processes and --process_id"
        )
    return address, count, index
