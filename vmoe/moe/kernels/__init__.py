"""Compute backends: how the rows that experts take are laid out in a buffer and multiplied by the experts' weights.

A backend is a module with two functions of plain tensors, which never see a router or a distributed tensor:

    layout(chosen_TK, kept_TK, slots_TK, groups, capacity, num_experts) -> Layout
    linear(x_RD, weight_EOD, bias_EO, layout) -> (R, O)

Every backend computes the same; they differ in which shapes and devices they are fast on.
"""
