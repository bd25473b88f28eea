"""Puzzles as tables: states in arrays, moves in bulk, exact distances of small ones, networks and compiled search."""
