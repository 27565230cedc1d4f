"""Specializations of compiled functions: what they were captured for, and when they are captured again.

In: a function and the arguments of a call. Out: a specialization that runs it. Imports: `runtime` and what is below it,
`optim`. `compile.CompiledFunction` asks `specializations` which one serves a call, by the facts of `guards` on the
arguments and `surroundings`; `specialization` makes a new one by a capture that `reads` watches, and runs it.
"""
