"""What torch.compile generates: a kernel reads back what it stored only when all warps have stored."""

import pytest
import torch
from torch import nn

from vmoe.compiling import mend_compiler

IMAGES, TOKENS, WIDTH = 1024, 64, 192


def two_residuals_and_norm(embedded, first, second, norm):
    """What a ViT computes between its first two blocks, from a patch embedding (B, D, h, w)."""
    x = embedded.flatten(2).transpose(1, 2).float() + first + second
    return x, norm(x)


@pytest.mark.gpu
def test_a_kernel_reads_back_after_a_barrier():
    import torch._inductor.config as inductor

    mend_compiler()
    torch.manual_seed(0)
    embedded = torch.randn(IMAGES, WIDTH, 8, 8, device="cuda", dtype=torch.bfloat16)
    first, second = torch.randn(2, IMAGES, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    norm = nn.LayerNorm(WIDTH, device="cuda")
    from torch._inductor.utils import run_and_get_code

    with torch.no_grad(), inductor.patch({"triton.persistent_reductions": False}):
        compiled = torch.compile(two_residuals_and_norm, dynamic=False)
        outputs, (code,) = run_and_get_code(compiled, embedded, first, second, norm)
        expected = two_residuals_and_norm(embedded, first, second, norm)
        assert "tl.debug_barrier()" in code
        for _ in range(20):
            for ours, theirs in zip(compiled(embedded, first, second, norm), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(outputs, compiled(embedded, first, second, norm), strict=True))
