"""What people look at: plots, image grids, pages, reports and dataset cards."""
