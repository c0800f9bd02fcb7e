"""Text from outside, such as names of files and classes, on its way to a terminal or a picture."""


def printable(text: str) -> str:
    r"""The text with its control characters as escapes, such as \x1b: no name moves the cursor or hides what is beside
    it, and any can be written.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
