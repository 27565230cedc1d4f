"""What an optimizer's step is given and makes of it: hyper-parameters, schedules, transforms, the update.

In: an optimizer's groups and state, inner gradients. Out: an update plan and the values it is filled with.
Imports: what `windows` imports, and its networks.
"""
