"""What the engine tells while it works: how far it is, where the time goes, what few bits cost.

In: calls of steps. Out: callbacks, times, a warning. Imports: `compiler`.
"""
