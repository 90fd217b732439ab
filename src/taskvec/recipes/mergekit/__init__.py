"""mergekit configurations read as recipes."""
