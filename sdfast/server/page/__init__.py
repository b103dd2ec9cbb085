"""The page at `/`: HTML, styles and scripts of this package, which speak to the server's own API.

`routes.py` serves them, with headers that let the page load nothing else; `static/` are the files, as they
are: `page.js` is where reading begins. `samplers.py` is the list that the page's choice is made of.
"""

from sdfast.server.page.routes import routes

__all__ = ["routes"]
