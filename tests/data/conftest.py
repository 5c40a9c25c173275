"""What the tests of data share."""

import pytest

from advmoe_jax.errors import UserError


@pytest.fixture(scope="session")
def refusal():
    """(function, its arguments) -> the message that a mistake ends in: always one line."""

    def message(function, *args, **kwargs):
        with pytest.raises(UserError) as caught:
            function(*args, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message
