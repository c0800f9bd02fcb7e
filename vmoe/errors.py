"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the option or file, what is wrong and what to do.

    In Python it is a `ValueError`. The command line prints it without a traceback and exits with code 2.

    Args:
        line: The line.
        everywhere: Whether all processes of a run stop by this error; one of them reports it.
    """

    def __init__(self, line: str, everywhere: bool = False) -> None:
        super().__init__(line)
        self.everywhere = everywhere
