"""Compilation in other processes, while the graph runs as it is in this one.

In: a flat graph and its inputs. Out: the compiled graph, when it is there. Imports: `ir`, `lower.files`,
`lower.backends`.
"""
