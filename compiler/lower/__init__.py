"""Graphs as callables.

In: a step graph and a lowering (backend, HVP mode). Out: a callable, compiled and checked where a backend was asked
for: in another process (`processes`), and kept for the next one (`files`). Imports: `ir`, `derive`.
"""
