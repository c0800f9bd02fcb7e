"""A run in a folder, start to end: `train` makes it from a config, the other files are its parts."""
