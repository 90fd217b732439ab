"""The command line: one module a verb; nothing heavy is imported until the verb runs."""
