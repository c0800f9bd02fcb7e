"""Backends that compute the experts' MLPs. They work on plain tensors and know nothing of routers.

A backend is a module with

    expert_mlp(x_TD, choices, mlp) -> (T, O)

It returns the sum over a token's choices of weight * mlp(token), for `interface.Choices` and `interface.Mlp`. All
backends give the same result. They differ in the shapes, types and devices that they support and are fast on.
`segments` takes everything. `padded` needs a capacity. `fused` is a folder, needs Triton, and takes what `requirements`
lists. `cpu` takes two layers with GELU on a CPU.

`segments` and `padded` share `rows` and `composed`.
"""
