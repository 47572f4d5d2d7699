"""The operations dashboard: one page, its assets, and the numbers it draws.

    dashboard = router.mount(app, data, …)        # a FastAPI application: `/`, `/dashboard/…`
    Dashboard(data).start()                       # any other server: `asset(path)`, `document(since)`

`data()` returns the numbers of this moment as plain JSON (see `source`); a sampler calls it once a second,
and the page asks `/dashboard/data?since=T` for what is new. The page and its assets hold no secrets and are
served to all; the numbers are behind the API's own keys.
"""

from farthing.server.dashboard.history import History
from farthing.server.dashboard.site import Dashboard, assets
from farthing.server.dashboard.source import server_data, service_data, visible_to

__all__ = ["Dashboard", "History", "assets", "server_data", "service_data", "visible_to"]
