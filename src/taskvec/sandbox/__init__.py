"""Generated programs, run in a sandbox."""
