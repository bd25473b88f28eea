"""The HTML report of a run or a comparison, and its plots."""
