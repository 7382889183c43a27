"""Where results go: files, dashboards, the terminal, pictures."""
