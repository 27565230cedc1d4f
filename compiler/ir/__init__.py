"""What an operator, a tensor, a recorded value, a step, an update, a trace, a loop, a program and a tape are.

`traces` is what is written down of running code, `programs` what becomes of it; here is what both are made of, and the
text and verifiers of all. In: nothing. Out: the data that all other packages pass on. Imports: `metaoptim.errors`,
`compat`.
"""
