"""The cost of a function as formulas, for `metaoptim.plan`."""
