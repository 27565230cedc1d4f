"""Sessions of ordinary windows: networks, what they show, steps as they are taken.

In: a user's networks, optimizers and losses. Out: a tape on an engine. Imports: `budget` and what is below it.
"""
