"""What a reader sees of results: tables, figures, report.md, report.html, CompressAI's JSON."""
