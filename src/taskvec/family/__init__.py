"""The models of a recipe, opened and made to fit each other."""
