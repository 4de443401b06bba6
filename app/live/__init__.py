"""Who gets what: `broadcast` sends pages to the `audience`, and `replay` to those who return.

Nothing here knows how a subscriber is connected, nor how a page is encoded: see `subscriber`.
What a subscriber asks for (filters, columns, snapshots) belongs here.
"""
