"""From a recipe to a published folder: recipe, family, plan, run, manifest."""
