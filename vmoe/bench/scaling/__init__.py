"""Measures training on several processes: its results, its speed and its checkpoints.

`jobs` lists the trainings. `worker` is the script that torchrun starts. `launch` starts it and reads its rows. `report`
compares the rows in tables.
"""
