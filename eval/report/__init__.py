"""From a comparison's results to tables, plots and a page with the pictures."""
