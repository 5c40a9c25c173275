"""AdvMoE whose routes an attacker can seldom move, on the digits: two minutes on two CPU cores.

The recipe of docs/claim.md that loses least by the route: a linear router that is trained for its
certificate, wider pathways for what that router saves, experts that share their steps.
"""

import digits
import recipe_rows


def get_config():
    """``digits.py`` with the changes of the row ``certified_shared``."""
    config = digits.get_config()
    config.update(recipe_rows.rows()["certified_shared"].changes)
    return config
