"""What `explain` says of a function and of a window, and what `plan` says of a call.

In: a program or a tape, and a planner. Out: a `Report` or a `Cost`. Imports: `functions` and what is below it.
"""
