"""What several processes do to a training: to its results, its speed and its checkpoints.

`jobs` says which trainings are measured, `worker` is the script that torchrun starts, `launch` starts it and reads its
rows, and `report` compares the rows in tables.
"""
