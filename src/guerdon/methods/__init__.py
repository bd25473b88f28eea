"""Methods, one file each, in rooms named by what they learn from."""
