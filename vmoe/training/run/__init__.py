"""A run in a folder, from start to end. `train` makes it from a config; the other files are its parts."""
