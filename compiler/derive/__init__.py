"""What a step means, and its derivatives, as flat graphs over ATen.

In: a step graph. Out: the flat graphs of its replay and of its VJP, divided by residuals where they can share work.
Imports: `ir`, `capture` (to leave its modes).
"""
