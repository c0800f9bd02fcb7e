"""The exception for all mistakes of users."""


class UserError(ValueError):
    """A mistake that the user can correct: one line with the option or file, what is wrong and what to do.

    In Python it is a `ValueError`. The command line prints it without a traceback and exits with code 2.

    Args:
        line: The line.
        everywhere: Whether all ranks of a run stop by this error. Then only one of them reports it.
    """

    def __init__(self, line: str, everywhere: bool = False) -> None:
        super().__init__(line)
        self.everywhere = everywhere
