"""Rewrites, in the order of `pipeline`; between two of them the program is verified.

In: a trace, of a function or of one recorded step. Out: a program. Imports: `ir`, `derive`, `lower`.
"""
