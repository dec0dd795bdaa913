"""The chat family: transformers' InternVL with what it lacks."""
