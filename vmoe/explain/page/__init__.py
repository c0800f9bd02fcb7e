"""The explorer's page: a report and its sampled images as one HTML file that opens from disk."""

from vmoe.explain.page.document import write_page

__all__ = ["write_page"]
