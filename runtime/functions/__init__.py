"""Captured functions and compiled steps at work.

In: traces, arguments. Out: results. Imports: `windows` and what is below it.
"""
