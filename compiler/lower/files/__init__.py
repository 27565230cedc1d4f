"""Graphs as files, so that another process compiles and derives what this one has, or need not do it again.

In: flat graphs. Out: their bytes, and what was compiled or derived from them. Imports: `ir`, `derive`.
"""
