"""The command line: one module a job, each of which parses, calls and prints."""
