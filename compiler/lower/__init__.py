"""Graphs as callables.

In: a step graph and a lowering (backend, HVP mode). Out: a callable, compiled and checked where a backend was asked
for. Imports: `ir`, `derive`.
"""
