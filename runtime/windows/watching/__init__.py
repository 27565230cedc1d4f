"""What is seen of losses and backwards: the theta that a loss has read, mistakes that no single call shows.

In: losses, and autograd's graph around a window. Out: what becomes of a loss, errors, warnings. Imports: `engine`, and
the sessions, networks, reads and updates of `windows`.
"""
