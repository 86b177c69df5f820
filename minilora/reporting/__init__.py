"""What a run shows of itself: trackers, charts, and the page report.html."""
