"""What is written down of running code: the slice of a recording that a loss depends on, a trace and its parts.

In: calls and their values. Out: calls with the structure that equal steps share. Imports: the rest of `ir`, but
for `programs`.
"""
