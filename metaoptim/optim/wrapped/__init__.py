"""The optimizers of torch and of other libraries as inner ones: their own steps, captured.

In: a `torch.optim.Optimizer`, or the arguments of one. Out: a `MetaOptimizer` whose update is the captured step.
Imports: the rest of `metaoptim.optim`, `runtime` and what is below it.
"""
