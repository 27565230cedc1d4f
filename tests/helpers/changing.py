"""A module whose state compiled functions read."""

SCALE = 1.0
steps = 0


class Config:
    """Read as a namespace."""

    scale = 1.0
