"""What becomes of traces and recordings: calls of step graphs and loops of them, a program, a tape.

In: step graphs, values. Out: data that the engine runs. Imports: the rest of `ir`, but
for `traces`.
"""
