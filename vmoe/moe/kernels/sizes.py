"""The integers of the kernels: limits, tile sizes, and the number of rows of a buffer.

The planner computes a step's memory and work from the same numbers, so this file needs no Triton.

T tokens with K choices; E experts; R rows of the buffer that experts compute.
"""

MIN_CAPABILITY = 8  # compute capability of Ampere, the oldest NVIDIA GPUs that Triton supports

# Limits of the routing kernels; above them PyTorch's operators are used
MAX_EXPERTS = 256  # E in the kernels of gates and ranks
MAX_SCORES = 64  # E in the kernel of scores; with more experts a library product is fast
MAX_BLOCKS = 32  # blocks of a group's choices that count those before their own; more have kernels for it
MAX_COMPARED = 2048  # tokens per group that are ordered by comparing all with all; the time grows with the square

SCORE_SPLITS = 64  # parts of the tokens; each writes its part of the scores' weight gradient

# Rows of the experts' buffer
ALIGNMENT = 128  # an expert's rows start at a multiple of this, so that no tile of a product holds two experts
MAX_SHARES = 1.15  # equal shares may have at most this many times as many rows as there are choices
TILE_ROWS = 128  # rows of the activation's tiles; divides ALIGNMENT
STRETCH = 64  # rows per program in the gradient of combine; divides ALIGNMENT
CHUNK_BYTES = 256 * 2**20  # with `recompute_activation` a larger hidden layer is computed in parts of this size


def rows_of_share(slots: int | None, num_choices: int, num_experts: int) -> int:
    """The rows of each expert's equal share; 0 where shares would waste memory and each expert gets what it needs.

    Args:
        slots: G * C, the largest number of choices per expert; None without a capacity.
        num_choices: T * K.
        num_experts: E.
    """
    if slots is None:
        return 0
    share = align(slots)
    return share if num_experts * share <= MAX_SHARES * num_choices + num_experts * ALIGNMENT else 0


def rows_of_buffer(num_choices: int, num_experts: int, share: int) -> int:
    """R: the rows of all shares. With share 0 it is enough for every choice and each expert's alignment."""
    return num_experts * share if share else align(num_choices) + num_experts * ALIGNMENT


def align(num_rows: int) -> int:
    """The next multiple of ALIGNMENT."""
    return cdiv(num_rows, ALIGNMENT) * ALIGNMENT


def columns_of(num_experts: int) -> int:
    """Columns of a tile that covers all experts."""
    return max(16, next_power_of_2(num_experts))


def tokens_of_block(num_experts: int) -> int:
    """Tokens of such a tile."""
    return max(8, 2048 // columns_of(num_experts))


def choices_of_block(num_experts: int) -> int:
    """Choices per program of the counting sort."""
    return max(32, min(256, 8192 // columns_of(num_experts)))


# The host calls these before each launch; Triton's functions of the same names are many times slower
def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than a positive number."""
    return 1 << (number - 1).bit_length()
