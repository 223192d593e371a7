"""The command line: parses, prints, exits. Nothing heavy is imported before a verb runs."""
