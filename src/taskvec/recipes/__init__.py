"""What a user asks for: recipes, read from YAML, JSON or mergekit's configurations."""
