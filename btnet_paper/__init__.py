"""What the notebooks need: scales, figures, tables, the runner."""
