"""Backends: how the experts' MLPs are computed from plain tensors, which never see a router.

A backend is a module with

    expert_mlp(x_TD, choices, mlp) -> (T, O)

the sum over a token's choices of weight * mlp(token), for `interface.Choices` and `interface.Mlp`. Every backend
computes the same. They differ in which shapes, types and devices they take and are fast on: `segments` takes all,
`padded` all with a capacity, `fused` those that `requirements` names (a folder, which needs Triton), and `cpu` those on
a CPU with GELU and no more.

`rows` and `composed` are what `segments` and `padded` share.
"""
