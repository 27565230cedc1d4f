"""Specializations of compiled functions: what they were captured for, and when they are captured again."""
