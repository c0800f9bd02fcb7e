"""The command line: one module per job, which parses, calls and prints."""
