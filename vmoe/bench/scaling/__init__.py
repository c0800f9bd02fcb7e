"""What several processes do to a training: to its results, its speed and the size of the model that fits.

One command starts worker processes, as torchrun would; each trains by the trainer that runs have, on synthetic images.
"""
