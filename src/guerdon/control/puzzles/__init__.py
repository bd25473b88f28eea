"""Puzzles as tables: states in arrays, moves in bulk, exact distances of small ones, and what learns and searches them."""
