"""Windows without a recording: their steps stay in the graph of eager autograd.

In: a user's networks, optimizers and losses. Out: networks that show tensors with a history. Imports: the sessions and
updates of `windows`.
"""
