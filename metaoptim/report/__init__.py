"""What `explain` says of a function and of a window, what `plan` says of a call, and `profile` of a block.

In: a program or a tape, a planner, times. Out: a `Report`, a `Cost` or a `Profile`. Imports: `functions` and
what is below it.
"""
