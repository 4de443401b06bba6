"""Follows the log of changes: `feed` reads it in order, woken by `listener`, paced by `pacing`.

`log` has every query on it, `offset` the positions in it. `health` decides whether changes arrive.
`retention` prunes the log, and `inspection` notices what no trigger can capture: both are
`maintenance`, which one node at a time does.
"""
