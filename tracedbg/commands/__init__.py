"""The verbs of the command line, one per file: each has NAME, HELP, arguments(parser) and run(args) -> exit code."""
