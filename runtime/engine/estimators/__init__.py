"""What `gradient=` chooses in the place of a sweep over all steps: evolution, a linear system, forward mode.

In: an engine and its tape, cotangents. Out: gradients of meta-parameters. Imports: the rest of `engine`, and
what is below it.
"""
