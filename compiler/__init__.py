"""Programs as data; no tensor of a user's is computed here.

In: the operators of user code. Out: step graphs, programs and callables. Imports: `metaoptim.errors`, torch,
networkx (`derive`) and sympy (`cost`).
Order, each importing only those before it: `ir`, `capture`, `derive`, `lower`, then `passes` and `cost`.
"""

if __name__ != "metaoptim.compiler":
    raise ImportError(f"import metaoptim.compiler, not the bare package {__name__!r}")
