"""Published data sets: their layouts, download, preparation, conversion; the demo's images."""
