"""Bytes and FLOPs of steps and programs, measured and as formulas. In: a program. Imports: `ir`, `derive`, `lower`."""
