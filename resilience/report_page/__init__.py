"""The page that tells a run in pictures: one HTML file that needs nothing else, not even a script.

    gather    from a run directory, a journal or a coordinator to `Material`
    model     report.json as rows, whatever version wrote it
    judgement what the page says in words: headline, what to do, how far the result is known to be bit-identical
    timeline, curves, tables   one picture each, as elements
    scales, markup, symbols    what they are drawn with

Nothing here decides anything about a run, and nothing is written but the page.
"""

from resilience.report_page.gather import Material, from_coordinator, from_directory
from resilience.report_page.page import draw_page

__all__ = ["Material", "draw_page", "from_coordinator", "from_directory"]
