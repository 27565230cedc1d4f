"""What is written down of running code: calls and their values, the slice a loss depends on, a trace and its parts.

In: operators and what they were given. Out: the values that recordings, traces and programs are made of. Imports: the
operators, tensors, steps and updates of `ir`.
"""
