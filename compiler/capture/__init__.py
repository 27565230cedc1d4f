"""What user code does, written down: entries over the values of `ir`.

`eager` records a window as it runs, on real tensors. `symbolic` traces a function over fake tensors. Here is what both
share: the dispatch modes and what they cannot see. In: running user code. Out: entries, traces. Imports: `ir`.
"""
