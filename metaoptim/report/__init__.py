"""What `explain` says of a function and of a window."""
