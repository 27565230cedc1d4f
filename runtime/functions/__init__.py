"""Captured functions and compiled steps at work. In: traces, arguments. Imports: `windows` and what is below it."""
