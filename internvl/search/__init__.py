"""Photo search: an index of a folder of photos, and searches in it by words and by images.

`store` is the index on disk, `scan` and `indexing` fill it, `searcher` finds photos, `server` shows
them in a browser.
"""
