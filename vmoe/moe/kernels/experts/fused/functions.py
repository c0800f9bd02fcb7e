"""The activation functions and their slopes as the kernels compute them, in float32."""

import triton
import triton.language as tl


@triton.jit
def value_and_slope(x, FUNCTION: tl.constexpr):
    """(f(x), f'(x)) of SiLU, of GELU (exact to 1e-7), or of GELU's tanh approximation."""
    if FUNCTION == "silu":
        # exp2 with the factor log2(e) = 1.4427, since it is the hardware's exponential
        cdf = _reciprocal(1.0 + tl.exp2(x * -1.4426950408889634))
        slope = cdf + x * cdf * (1.0 - cdf)
    elif FUNCTION == "gelu_tanh":
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)); 2.885 is 2 log2(e)
        cdf = _reciprocal(1.0 + tl.exp2(u * -2.885390081777927))
        slope = cdf + x * cdf * (1.0 - cdf) * (1.5957691216057308 + 0.2140644488178074 * x * x)
    else:
        # Abramowitz and Stegun 7.1.26; its exponential also gives the density
        density = tl.exp2(x * x * -0.7213475204444817)
        t = _reciprocal(1.0 + 0.23164189 * tl.abs(x))
        tail = ((((0.5307027 * t - 0.7265760) * t + 0.7107068) * t - 0.1422484) * t + 0.1274148) * t * density
        cdf = tl.where(x >= 0, 1.0 - tail, tail)
        slope = cdf + 0.3989422804014327 * x * density
    return x * cdf, slope


@triton.jit
def _reciprocal(x):
    # for positive x: one product and one instruction, where a division takes eight
    return tl.rsqrt(x * x)
