"""Integer arithmetic of grids, many times cheaper than Triton's own functions of these names."""


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than a positive number."""
    return 1 << (number - 1).bit_length()
