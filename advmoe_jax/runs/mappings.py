"""Room for compiled programs: Linux grants a process 65,530 mappings, and XLA takes several each.

A comparison of ten structures comes to the limit with nearly all memory free, and LLVM then ends
the process. So what was compiled is dropped between runs once half of the mappings are in use; what
is needed again comes from the cache on disk, if there is one, or is compiled again.
"""

from pathlib import Path

import jax

MAPPINGS = Path("/proc/self/maps")
LIMIT = Path("/proc/sys/vm/max_map_count")


def make_room() -> bool:
    """Drops all compiled programs if they leave little room for more, and says whether it did.

    On systems without such a limit it does nothing.
    """
    try:
        limit = int(LIMIT.read_text())
        with MAPPINGS.open() as lines:
            used = sum(1 for _ in lines)
    except (OSError, ValueError):
        return False
    if 2 * used < limit:
        return False
    jax.clear_caches()
    return True
