"""Runs steps forward, again and backward, and joins them to autograd.

In: calls of step graphs, a schedule, cotangents. Out: states and gradients. Imports: `compiler`, `states`.
"""
