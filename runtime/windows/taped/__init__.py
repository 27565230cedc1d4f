"""Windows without a recording: their steps stay in the graph of eager autograd.

In: a user's networks, optimizers and losses. Out: networks that show tensors with a history. Imports: `engine`, and the
sessions, networks and updates of `windows`.
"""
