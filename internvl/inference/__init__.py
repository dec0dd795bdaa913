"""A loaded model in use: requests to answers, images and texts to features."""
