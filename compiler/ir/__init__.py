"""What a recorded value, a step, a trace, a segment, a loop, a program and a tape are.

In: nothing. Out: the data that all other packages pass on, its text and its verifiers. Imports: `metaoptim.errors`.
"""
