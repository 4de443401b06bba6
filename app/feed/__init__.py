"""Follows the log of changes: `feed` reads it in order, woken by `listener`, paced by `pacing`.

`log` has every query on it, `offset` the positions in it. `retention` prunes it, and `inspection`
notices what no trigger can capture: `maintenance`, which one node at a time does.
"""
