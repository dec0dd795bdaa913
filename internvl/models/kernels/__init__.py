"""Faster forms of single layers; each has a slow twin that tests hold it to."""
