"""Which states are kept, and where.

In: positions and states. Out: schedules, slots, tiers. Imports: `compiler`.
"""
