"""What becomes of a trace or a recording: calls of step graphs and loops of them, a program, a tape.

In: step graphs, values. Out: data that the engine runs. Imports: `ir.traces` and what is below it, the text of `ir`.
"""
