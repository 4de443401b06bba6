"""Who gets what: `broadcast` sends pages to the `audience`, and `replay` to those who return.

Nothing here knows how a subscriber is connected, nor how a page is encoded: see `subscriber`.

What a client asks for is a `Request` (`subscription`), with a `filter`. The `catalogue` binds it to
the topic's `table`: the filter becomes a `condition`, which tells whether a row matches. `events`
are what a page of changes means to a subscription; before them comes a `snapshot`, the rows that
there are.
"""
