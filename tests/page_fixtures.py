"""HTML pages, read as a browser reads them, and a name that could break them."""

import json
from html.parser import HTMLParser

EVIL = "$\\frac{$ </script><img src=x onerror=alert(1)><!-- \"'&"


class Page(HTMLParser):
    """The elements of a page in their order, and its data in JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.data = [], set(), []
        self.is_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.is_data = ("type", "application/json") in attrs

    def handle_endtag(self, tag: str) -> None:
        self.is_data = False

    def handle_data(self, data: str) -> None:
        if self.is_data:
            self.data.append(json.loads(data))
