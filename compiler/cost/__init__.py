"""Bytes and FLOPs of steps and programs, measured and as formulas.

In: a program. Out: numbers and formulas. Imports: `ir`, `derive`, `lower`.
"""
