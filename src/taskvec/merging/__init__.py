"""Prepare, decide, apply: from a recipe to merged blocks."""
