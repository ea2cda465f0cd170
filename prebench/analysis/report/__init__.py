"""A study as one self-contained HTML page, rebuilt from the records alone."""

from prebench.analysis.report.build import write_page

__all__ = ["write_page"]
