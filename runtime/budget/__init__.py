"""How much memory there is, what a plan takes, and which plan fits.

In: a program or a tape, and an amount. Out: a number of slots, or an error. Imports: `engine` and what is below it.
"""
