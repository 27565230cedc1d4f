"""The passes that come before step graphs: on a trace, and on the partition that `split` makes of it.

In: a trace. Out: a partition whose equal parts are equal in what they read and give. Imports: `ir`, `passes.options`.
"""
