"""Sizes of images: the side of a square, or (height, width), in pixels."""

ImageSize = int | tuple[int, int]


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """A size as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def as_size(height: int, width: int) -> ImageSize:
    """The size of images of this height and width: one number for squares."""
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """A size in words, such as "224 x 224" or "128 x 64 (height x width)"."""
    height, width = height_and_width(size)
    return f"{height} x {width}" + ("" if height == width else " (height x width)")
