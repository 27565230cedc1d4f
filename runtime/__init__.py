"""What executes programs and tapes on a user's tensors.

In: step graphs, their callables and real tensors. Out: meta-gradients, through nodes of autograd. Imports: `compiler`.
Order, each importing only those before it: `states`, `engine`, `budget`, `windows`, `functions`.
"""

if __name__ != "metaoptim.runtime":
    raise ImportError(f"import metaoptim.runtime, not the bare package {__name__!r}")
