"""The page of a server: a chat, and charts behind a tab; its assets and its data.

    dashboard = router.mount(app, data, …)        # a FastAPI application: `/`, `/dashboard/…`
    Dashboard(data).start()                       # any other server: `asset(path)`, `document(since)`

`data()` returns the current numbers as plain JSON (see `source`). A sampler calls it once per second, and the
page fetches new points from `/dashboard/data?since=T`. The page and its assets contain no secrets and are
public; the numbers require an API key."""
