"""Errors that gave other numbers, or another training, without a word."""
