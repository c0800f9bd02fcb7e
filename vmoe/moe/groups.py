"""Routing groups: the tokens of a group compete with one another for an expert's capacity.

B images, N tokens per image, T = B*N tokens; G groups of S tokens. Consecutive images form a group, as in the original
code.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(NamedTuple):
    """How T tokens are split into G groups of S tokens.

    Attributes:
        count: G.
        size: S.
        last: Tokens of the last group, the only one that may be smaller.
        tokens: N, tokens per image.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing here calls
    size: int
    last: int
    tokens: int

    @classmethod
    def of(cls, images: int, tokens: int, group: Literal["image", "batch"] | int) -> "Groups":
        """Splits `images` x `tokens` tokens by `MoeConfig.group`: "image", "batch" or a number of images."""
        if group == "image":
            return cls(images, tokens, tokens, tokens)
        per_group = max(images, 1) if group == "batch" else group
        if images <= per_group:
            return cls(1, images * tokens, images * tokens, tokens)
        count, rest = images // per_group, images % per_group  # torch.compile does not know divmod
        if rest == 0:
            return cls(count, per_group * tokens, per_group * tokens, tokens)
        return cls(count + 1, per_group * tokens, rest * tokens, tokens)

    @property
    def is_even(self) -> bool:
        """Whether the last group is as large as the others."""
        return self.last == self.size

    def split(self, values: Tensor) -> Tensor:
        """(T, ...) -> (G, S, ...). Zeros fill an incomplete last group."""
        missing = self.size - self.last
        if missing:
            values = F.pad(values, [0, 0] * (values.dim() - 1) + [0, missing])
        return values.reshape(self.count, self.size, *values.shape[1:])

    def merge(self, values: Tensor) -> Tensor:
        """(G, S, ...) -> (T, ...), the inverse of `split`."""
        flat = values.reshape(self.count * self.size, *values.shape[2:])
        # a slice of everything would be one more node of autograd's graph
        return flat if self.is_even else flat[: (self.count - 1) * self.size + self.last]

    def valid(self, token_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Which tokens are real: (G, S) bool, or None when all are. `token_mask` is (T,) bool, False for padding."""
        if token_mask is None and self.is_even:
            return None
        if token_mask is None:
            tokens = (self.count - 1) * self.size + self.last
            token_mask = torch.ones(tokens, dtype=torch.bool, device=device)
        return self.split(token_mask)
