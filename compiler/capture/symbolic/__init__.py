"""The tracer of a function. In: operators on fake tensors. Out: a trace. Imports: `ir`, `capture`."""
