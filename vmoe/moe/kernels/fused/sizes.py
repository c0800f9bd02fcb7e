"""Integer arithmetic of grids, many times cheaper than Triton's own functions of these names."""


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than a positive number."""
    return 1 << (number - 1).bit_length()


def columns_of(num_experts: int) -> int:
    """Columns of a tile that holds all experts."""
    return max(16, next_power_of_2(num_experts))


def tokens_of_block(num_experts: int) -> int:
    """Tokens of such a tile."""
    return max(8, 2048 // columns_of(num_experts))
