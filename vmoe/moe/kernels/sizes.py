"""The integers of the kernels: limits, tiles, and how many rows a buffer has. Needs no Triton.

The planner computes a step's memory and work from the same numbers, on machines without Triton.

T tokens with K choices; E experts; R rows of the buffer that experts compute.
"""

MIN_CAPABILITY = 8  # of an NVIDIA GPU: Ampere, the oldest that Triton supports

# Limits of the routing kernels, above which other operators serve
MAX_EXPERTS = 256  # E of the gates' and the ranks' kernels
MAX_SCORES = 64  # E of the scores' kernel; a library product is good at more
MAX_COMPARED = 2048  # tokens of a group that are ordered by comparing all with all; the time grows with their square

SCORE_SPLITS = 64  # of the tokens, of which each leaves its part of the scores' weight gradient

# Rows of the experts' buffer
ALIGNMENT = 128  # an expert's rows start at a multiple of this, so that no tile of a product holds two experts
MAX_SHARES = 1.15  # equal shares may set aside so many times the rows that are chosen
TILE_ROWS = 128  # of the activation's tiles; divides ALIGNMENT
STRETCH = 64  # rows that a program of combine's gradient walks through; divides ALIGNMENT
CHUNK_BYTES = 256 * 2**20  # where memory is to be saved, more of the hidden layer than this is computed in parts


def rows_of_share(slots: int | None, num_choices: int, num_experts: int) -> int:
    """The rows that are set aside for each expert; 0 where that would waste memory, so that it gets what it needs.

    Args:
        slots: G * C, what the capacity lets an expert take; None without a capacity.
        num_choices: T * K.
        num_experts: E.
    """
    if slots is None:
        return 0
    share = align(slots)
    return share if num_experts * share <= MAX_SHARES * num_choices + num_experts * ALIGNMENT else 0


def rows_of_buffer(num_choices: int, num_experts: int, share: int) -> int:
    """R: the experts' shares or, with share 0, room for every choice with each expert's rows aligned."""
    return num_experts * share if share else align(num_choices) + num_experts * ALIGNMENT


def align(num_rows: int) -> int:
    """The next multiple of ALIGNMENT."""
    return cdiv(num_rows, ALIGNMENT) * ALIGNMENT


def columns_of(num_experts: int) -> int:
    """Columns of a tile that holds all experts."""
    return max(16, next_power_of_2(num_experts))


def tokens_of_block(num_experts: int) -> int:
    """Tokens of such a tile."""
    return max(8, 2048 // columns_of(num_experts))


def choices_of_block(num_experts: int) -> int:
    """Choices that a program of the counting sort takes."""
    return max(32, min(256, 8192 // columns_of(num_experts)))


# Many times cheaper than Triton's own functions of these names, which the host calls before each launch
def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than a positive number."""
    return 1 << (number - 1).bit_length()
