"""Guerdon beside its peers: the same mathematics on the same data, timed in turn. See README.md."""
