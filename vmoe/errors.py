"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend: one line that names the option or file, what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
