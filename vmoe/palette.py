"""One colour per expert: the same expert has the same colour in every figure.

A search has spread the 32 colours in OKLab (https://bottosson.github.io/posts/oklab/) for normal vision and for
simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113, severity
1): first the first 8, then 12, then all. The smallest distance of any two colours over the four kinds of vision, as the
tests measure it:

    first colours   OKLab   CIEDE2000
                8   0.164        17.0
               12   0.097        11.7
               16   0.064         6.8
               32   0.063         5.4

Two flat colours side by side look different from a CIEDE2000 of about 2; from memory or in a legend, from about 10. So
beyond 12 experts colour alone does not identify an expert, and figures also print its number. Beyond 32 colours repeat.
"""

from importlib.resources import files

import numpy as np

_RGB = np.frombuffer(
    bytes.fromhex(
        "1879c1 f78987 ffd75e 522588 58faf1 84110c 95adfa 986f1f "
        "75475e dd507f b39720 5b0b3e 6044dd edb173 356731 8b61fa "
        "badab6 b61502 85d4f9 61805e afbb1b 341e63 aeffb4 54c5b4 "
        "2f3e63 8489ec 63313b ab95c7 594690 a077a2 7d5b93 4135bb "
    ),
    dtype=np.uint8,
).reshape(-1, 3)
NUM_COLOURS = len(_RGB)


def page_colours() -> str:
    """The style sheet with the colours of every page, in light and dark. A page's own sheet follows it."""
    return (files("vmoe") / "palette.css").read_text(encoding="utf-8")


def expert_hex(expert: int) -> str:
    """The colour of an expert as "#rrggbb". From expert 32 on the colours repeat."""
    return "#" + _RGB[expert % NUM_COLOURS].tobytes().hex()


def expert_colours(num_experts: int) -> np.ndarray:
    """The colours of experts 0 to E-1: (E, 3) float sRGB in [0, 1]."""
    return _RGB[np.arange(num_experts) % NUM_COLOURS] / 255


def ink_on(colour: np.ndarray) -> np.ndarray:
    """Black or white for text on a colour, by the higher contrast: (..., 3) sRGB -> (..., 3)."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    # The luminance at which both contrasts of WCAG 2, (1 + .05) / (Y + .05) and (Y + .05) / .05, are equal.
    dark_text = luminance > np.sqrt(1.05 * 0.05) - 0.05
    return np.where(dark_text[..., None], 0.0, 1.0) * np.ones(3)
