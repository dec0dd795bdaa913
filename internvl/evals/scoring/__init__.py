"""Scores and parsers of the benchmarks: plain functions on texts, boxes and rows.

Each gives the number that the original's script gives, its mistakes included; the functions called
`careful_…` read an answer as a reader would and serve `corrected: true` and `qa-file`.
"""
