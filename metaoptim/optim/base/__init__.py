"""What inner optimizers are built from: parameter groups, hyper-parameters, chunks of a batch, how a step is taken.

In: networks, numbers and tensors, losses. Out: what `MetaOptimizer` checks, keeps and hands to the window that is open.
Imports: `runtime` and what is below it.
"""
