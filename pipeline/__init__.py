"""qtool: quantize a code model and know what it cost."""

import click


class QtoolError(click.ClickException):
    """An error the user can act on: what is wrong, why, and what to do.

    ``exit_code``: 2 the input is wrong (default), 3 the machine lacks something.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click types it as a class variable and reads the instance
