"""Loads models and uses them: requests to answers, images and texts to features."""
